"""The statistics, on streams whose truth is known.

Shapes: G groups, S samples of one model in a group.
"""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, t

from dotexport.bench.statistics import RESOLUTION, Comparison, _tail_probability, compare, summarize

Array = NDArray[np.float64]

GROUPS, BLOCK = 15, 2
TURNS = "ABBA"
ROWS = ([7.0, 8.0, 9.5], [9.0, 11.0, 12.0])


def stream(rng: np.random.Generator, factor: float) -> tuple[Array, Array]:
    """Times of a candidate `factor` times as slow, and of a baseline, on a drifting machine.

    The machine's pace wanders by a few percent from request to request, slows down by a quarter
    over the run, and now and then something else takes the processor.
    """
    count = GROUPS * len(TURNS) * BLOCK
    wander = np.cumsum(rng.normal(0, 0.01, count)) + np.linspace(0, 0.25, count)
    jitter = rng.normal(0, 0.02, count) + rng.exponential(0.01, count)
    hiccup = rng.choice([0, 0.5], count, p=[0.97, 0.03])
    pace = (10 * np.exp(wander + jitter + hiccup)).reshape(GROUPS, len(TURNS), BLOCK)
    ours = np.array([turn == "A" for turn in TURNS])
    return factor * pace[:, ours].reshape(GROUPS, -1), pace[:, ~ours].reshape(GROUPS, -1)


def verdicts(factor: float, runs: int) -> list[Comparison]:
    pairs = (stream(np.random.default_rng(seed), factor) for seed in range(runs))
    return [compare(*pair, resamples=500) for pair in pairs]


def test_a_summary_agrees_with_the_standard_library() -> None:
    values = np.random.default_rng(0).gamma(2, size=101)
    summary = summarize(values)
    assert summary.mean == pytest.approx(statistics.mean(values))
    assert summary.std == pytest.approx(statistics.stdev(values))
    # With 101 values every whole percentile is one of them.
    ordered = sorted(values)
    assert (summary.p50, summary.p90, summary.p95, summary.p99) == pytest.approx(
        (ordered[50], ordered[90], ordered[95], ordered[99])
    )


def test_one_value_is_its_own_summary() -> None:
    assert summarize([3.0]).std == 0
    assert summarize([3.0]).p99 == 3


def test_a_against_a_holds_one_in_at_least_nine_of_ten_runs() -> None:
    compared = verdicts(1.0, runs=100)
    assert sum(c.low <= 1 <= c.high for c in compared) >= 90
    assert sum(c.verdict.startswith("no measurable gain") for c in compared) >= 95


@pytest.mark.parametrize(("factor", "word"), [(0.9, "faster"), (1.1, "slower")])
def test_ten_percent_are_found_every_time(factor: float, word: str) -> None:
    assert all(word in c.verdict for c in verdicts(factor, runs=10))


def test_the_interval_covers_the_true_ratio() -> None:
    covered = [c.low <= 0.8 <= c.high for c in verdicts(0.8, runs=100)]
    assert sum(covered) >= 90


def test_drift_that_both_models_share_does_not_widen_the_interval() -> None:
    pace_GS = np.linspace(10, 20, GROUPS)[:, None] * np.ones((1, 4))
    comparison = compare(0.5 * pace_GS, pace_GS)
    # Equal in exact arithmetic: each resample holds the same groups of both.
    assert (comparison.low, comparison.ratio, comparison.high) == pytest.approx((0.5, 0.5, 0.5))


def test_on_a_steady_machine_the_ratio_is_that_of_the_plain_medians() -> None:
    rng = np.random.default_rng(4)
    # Odd blocks of the same values in each group: every median is one of the values.
    ours_GS, theirs_GS = (rng.permuted(np.tile(row, (GROUPS, 1)), axis=1) for row in ROWS)
    ratio = np.median(ours_GS) / np.median(theirs_GS)
    assert compare(ours_GS, theirs_GS).ratio == pytest.approx(ratio)


def test_swapping_the_models_inverts_the_ratio() -> None:
    ours, theirs = stream(np.random.default_rng(1), 0.8)
    forth, back = compare(ours, theirs), compare(theirs, ours)
    assert forth.ratio == pytest.approx(1 / back.ratio)
    # Quantiles are interpolated between resamples, hence not inverted to the last digit.
    assert forth.low == pytest.approx(1 / back.high, rel=1e-3)


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = stream(np.random.default_rng(2), 1.0)
    assert compare(*pair, seed=5) == compare(*pair, seed=5)
    assert compare(*pair, seed=5) != compare(*pair, seed=6)


def test_resampling_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = stream(np.random.default_rng(3), 1.0)
    whole = compare(*pair)
    monkeypatch.setattr("dotexport.bench.statistics.MAX_CELLS", 1000)
    assert compare(*pair) == whole


def test_tails_are_those_of_students_distribution() -> None:
    expected = norm.cdf(-t.ppf(0.975, 14) * np.sqrt(15 / 14))
    assert _tail_probability(15) == pytest.approx(expected)


def test_verdicts_read_as_sentences() -> None:
    assert (
        Comparison(0.8, 0.78, 0.82, GROUPS).verdict == "1.25x faster (95 % interval 1.22 to 1.28)"
    )
    assert Comparison(1.25, 1.2, 1.3, GROUPS).verdict == "1.25x slower (95 % interval 1.20 to 1.30)"
    assert Comparison(1.0, 0.9, 1.1, GROUPS).verdict.startswith("no measurable gain")


def test_a_difference_below_the_resolution_is_not_claimed() -> None:
    edge = 1 - RESOLUTION / 2
    assert Comparison(edge, edge - 1e-4, edge + 1e-4, GROUPS).verdict.startswith(
        "no measurable gain"
    )


def test_few_groups_give_no_verdict() -> None:
    few = Comparison(0.5, 0.4, 0.6, groups=7)
    assert not few.faster
    assert few.verdict.startswith("no verdict: 7 groups of requests, 8 are needed")
    assert Comparison(0.5, 0.4, 0.6, groups=8).faster


def processes(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """Times of one model in pairs of processes, each some percent off while it lives."""
    luck_2C = np.exp(rng.normal(0, 0.05, (2, rounds)))
    noise_2GS = np.exp(rng.normal(0, 0.05, (2, 2 * rounds, 4)))
    candidate_GS, baseline_GS = 10 * noise_2GS * np.repeat(luck_2C, 2, axis=1)[..., None]
    return candidate_GS, baseline_GS


def test_rounds_keep_the_luck_of_processes_inside_the_interval() -> None:
    held, blind = 0, 0
    for seed in range(100):
        pair = processes(np.random.default_rng(seed), rounds=8)
        whole = compare(*pair, rounds=8, resamples=500)
        held += whole.low <= 1 <= whole.high
        apart = compare(*pair, resamples=500)  # as if each group had processes of its own
        blind += apart.low <= 1 <= apart.high
    assert held >= 90
    assert blind < held


def test_few_rounds_are_drawn_by_group() -> None:
    pair = processes(np.random.default_rng(0), rounds=4)
    one, two = compare(*pair, rounds=4), compare(*pair)
    assert (one.low, one.high) == (two.low, two.high)
    assert (one.rounds, two.rounds) == (4, 1)


def test_rounds_of_unequal_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds of equally many"):
        compare(np.ones((7, 2)), np.ones((7, 2)), rounds=2)


def test_too_few_groups_or_unlike_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="groups"):
        compare(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="one group"):
        compare([[1.0, 1.0]], [[9.0, 9.0]])
    with pytest.raises(ValueError, match="by group and sample"):
        compare(np.ones(3), np.ones(3))
