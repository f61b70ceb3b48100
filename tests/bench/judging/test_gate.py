"""Gates: what a limit means, what noise may excuse, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dotexport.bench.comparison import Compared
from dotexport.bench.gate import DOUBT, MET, MISSED, Limit, figure_of, hold, parse_gate, verdict
from dotexport.bench.intervals import STATISTICS, Estimate, alone, interleaved, unpaired
from dotexport.bench.sides import of_result
from dotexport.bench.statistics import compare
from dotexport.bench.verdicts import judge
from dotexport.errors import UsageError
from dotexport.storage import manifest

Write = Callable[..., Path]


def limit(text: str, name: str = "decode_tok_s", rule: str = "doubt-passes") -> Limit:
    return parse_gate({name: text, "rule": rule}, "gate")[0]


def gate(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "gate.yaml"
    file.write_text(text, encoding="utf-8")
    return file


CLEAR = Estimate(1.30, 1.27, 1.33, groups=12)
BELOW = Estimate(1.12, 1.10, 1.14, groups=12)
ASTRIDE_MISSED = Estimate(1.14, 1.11, 1.17, groups=12)
ASTRIDE_MET = Estimate(1.16, 1.13, 1.19, groups=12)
NOISY = Estimate(1.10, 0.80, 1.40, groups=12)
FEW = Estimate(1.14, 1.11, 1.17, groups=4)
COUNTED = Estimate(1.14)


@pytest.mark.parametrize(
    ("found", "doubt_passes", "point", "strict"),
    [
        (CLEAR, MET, MET, MET),
        (BELOW, MISSED, MISSED, MISSED),
        (ASTRIDE_MISSED, DOUBT, MISSED, MISSED),
        (ASTRIDE_MET, MET, MET, MISSED),
        (NOISY, MISSED, MISSED, MISSED),
        (FEW, MISSED, MISSED, MISSED),
        (COUNTED, MISSED, MISSED, MISSED),
        (Estimate(1.2), MET, MET, MET),
        (Estimate(1.2, groups=1), MET, MET, MISSED),
    ],
    ids=lambda value: f"{value.value}/{value.groups}" if isinstance(value, Estimate) else value,
)
def test_each_rule_makes_of_noise_what_it_says(
    found: Estimate, doubt_passes: str, point: str, strict: str
) -> None:
    rules = {"doubt-passes": doubt_passes, "point": point, "strict": strict}
    for rule, expected in rules.items():
        assert verdict(limit(">=1.15x", rule=rule), found) == expected


def test_a_build_like_the_last_one_seldom_fails_on_no_regression(make: Any) -> None:
    """The point alone would fail every other time; a slow-down of 10 % fails each time."""
    outcomes: dict[float, list[str]] = {1.0: [], 1.1: []}
    for seed in range(20):
        for pace, found in outcomes.items():
            report = of_result(make(pace, seed=seed), Path("r.json"))
            line = hold([limit("<=1.0x", "tpot_p50")], [Compared(report)])[0]
            found.append(line.outcome)
    assert outcomes[1.1] == [MISSED] * 20
    # Missed by chance in 2.5 of 100; 3 of 20 would happen once in a hundred times.
    assert outcomes[1.0].count(MISSED) <= 2
    assert outcomes[1.0].count(MET) < 18


def test_a_rate_is_held_by_the_inverse_of_its_time(make: Any) -> None:
    compared = Compared(of_result(make(0.8), Path("r.json")))
    rate, time = compared.ratio("decode_tok_s"), compared.ratio("p50_tpot_ms")
    assert rate.value == pytest.approx(1 / time.value)
    assert (rate.low, rate.high) == pytest.approx((1 / time.high, 1 / time.low))  # type: ignore[operator]
    value = compared.value("decode_tok_s")
    assert value.value == compared.report.candidate.figures["decode_tok_s"]
    assert value.low < value.value < value.high  # type: ignore[operator]


def test_the_median_has_the_interval_of_the_bench(make: Any) -> None:
    result = make(0.8)
    ours, theirs = (m.by_group("tpot") for m in (result.candidate, result.baseline))
    expected = compare(ours, theirs, seed=5)
    found = interleaved(ours, theirs, STATISTICS["p50"], seed=5)
    assert (found.value, found.low, found.high) == (expected.ratio, expected.low, expected.high)


def test_a_drift_that_both_share_widens_the_unpaired_interval_alone(make: Any) -> None:
    result = make(0.8, groups=16)
    drift_G1 = [[1 + 0.05 * group] for group in range(16)]
    ours, theirs = (m.by_group("tpot") * drift_G1 for m in (result.candidate, result.baseline))
    paired, apart = (f(ours, theirs, STATISTICS["p90"]) for f in (interleaved, unpaired))
    assert apart.high - apart.low > 3 * (paired.high - paired.low)  # type: ignore[operator]
    assert apart.low < 0.8 < apart.high  # type: ignore[operator]


def test_rounds_of_fresh_processes_are_drawn_whole(make: Any) -> None:
    """A process that is slow by luck is one witness, however many groups it ran."""
    result = make(1.0, groups=16, noise=0.001)
    luck_G1 = [[1 + 0.1 * (group // 2 % 2)] for group in range(16)]
    times_GS = result.candidate.by_group("tpot") * luck_G1
    by_group, by_round = (alone(times_GS, STATISTICS["mean"], rounds=rounds) for rounds in (1, 8))
    assert by_round.high - by_round.low > 1.2 * (by_group.high - by_group.low)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("ttft_p90", "p90_ttft_ms"),
        ("tpot_p99_ms", "p99_tpot_ms"),
        ("p99_tpot_ms", "p99_tpot_ms"),
        ("itl_mean", "mean_itl_ms"),
        ("peak_rss", "peak_rss_bytes"),
        ("peak_rss_bytes", "peak_rss_bytes"),
        ("decode_tok_s", "decode_tok_s"),
        ("kl", "kl"),
    ],
)
def test_figures_go_by_the_names_of_people_and_of_the_report(name: str, figure: str) -> None:
    assert figure_of(name) == figure


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("artifact_bytes", "<=20MB", 20e6),
        ("artifact_bytes", "<= 1 MiB", 2**20),
        ("peak_rss", "<2GB", 2e9),
        ("tpot_p99_ms", "<=12", 12),
        ("tpot_p99", "<=0.012s", 12),
        ("load_s", "<=500ms", 0.5),
        ("top1", ">=90%", 0.9),
        ("kl", "<=1e-1", 0.1),
        ("ttft_p90", "<=1.0x", 1.0),
    ],
)
def test_a_limit_may_be_in_any_unit_of_its_figure(name: str, text: str, value: float) -> None:
    assert limit(text, name).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must map figures to limits"),
        ([">=1"], "must map figures to limits"),
        ({}, "has no limits"),
        ({"rule": "strict"}, "has no limits"),
        ({"kl": 0.1}, "must be a limit such as"),
        ({"kl": "0.1"}, "must be a limit such as"),
        ({"kl": "=<0.1"}, "must be a limit such as"),
        ({"kl": "<=-1"}, "must be a limit such as"),
        ({"kl": "<=0.1MB"}, "is in 'MB'; expected x, or a number alone"),
        ({"tpot_p50": "<=5GB"}, "expected x, us, ms, s"),
        ({"kl": "<=0.1", "rule": "kind"}, "rule must be one of doubt-passes, point, strict"),
        ({"kl": {"limit": "<=0.1", "rule": "kind"}}, "rule must be one of"),
        ({"kl": {"most": "<=0.1"}}, "unknown key 'most'; known: limit, rule"),
        ({"kl": {"rule": "strict"}}, "must be a limit such as"),
    ],
)
def test_what_is_no_gate_is_refused(content: Any, message: str) -> None:
    with pytest.raises(UsageError) as info:
        parse_gate(content, "gate")
    assert message in str(info.value)


def test_a_line_has_its_own_rule_and_several_limits() -> None:
    limits = parse_gate(
        {"ttft_p90": ["<=1.0x", {"limit": "<=50ms", "rule": "strict"}], "rule": "point"}, "gate"
    )
    assert [(m.relative, m.rule) for m in limits] == [(True, "point"), (False, "strict")]
    forced = parse_gate({"kl": {"limit": "<=1", "rule": "point"}}, "gate", "strict")
    assert forced[0].rule == "strict"


def test_an_unknown_figure_is_refused_with_those_that_there_are(
    write: Write, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"(?s)decode_toks.*did you mean decode_tok_s\?.*ttft_p90"):
        judge([write()], gate=gate(tmp_path, 'decode_toks: ">=1x"'))


def test_quality_that_nobody_measured_is_asked_for(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="knows no quality; give --quality OUT"):
        judge([write()], gate=gate(tmp_path, 'kl: "<=0.1"'))


def test_quality_comes_from_the_output_of_the_report_or_from_what_is_given(
    write: Write, output: Path, tmp_path: Path
) -> None:
    asked = gate(tmp_path, 'perplexity: ["<=1.10x", "<=7.9"]\nkl: "<=0.1"\ntop1: ">=90%"')
    inside = judge([output / "reports/bench-ort-cpu-fp32.json"], gate=asked)
    beside = judge([write()], gate=asked, quality=[output])
    for found in (inside, beside):
        assert [line.outcome for line in found.lines] == [MET, MISSED, MET, MET]
    ratio = inside.lines[0].found
    # 8 / 7.5 with a standard error of 0.01 in its logarithm.
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.0460, 1.0667, 1.0878), abs=1e-4)


def test_a_second_text_has_limits_of_its_own(
    fill: Callable[..., Path], output: Path, tmp_path: Path
) -> None:
    asked = gate(tmp_path, 'other_perplexity: ["<=1.10x", "<=70"]\nother_kl: "<=0.1"')
    first = manifest.read(output)["quality"]
    other = first | {"perplexity": 80.0, "baseline_perplexity": 40.0, "kl": 0.05, "text": "self"}
    folder = fill(tmp_path / "small", quality=first | {"other": other})
    found = judge([folder / "reports/bench-ort-cpu-fp32.json"], gate=asked)
    assert [line.outcome for line in found.lines] == [MISSED, MISSED, MET]
    assert found.lines[0].found.value == pytest.approx(2)
    with pytest.raises(UsageError, match="has no second text; run `dotexport eval` with --other"):
        judge([output / "reports/bench-ort-cpu-fp32.json"], gate=asked)


def test_an_evaluation_without_a_figure_says_which_it_has(output: Path, tmp_path: Path) -> None:
    """As of a classifier in a narrower stream, whose embeddings stand beside no others."""
    report, asked = output / "reports/bench-ort-cpu-fp32.json", gate(tmp_path, 'cosine: ">=0.95"')
    with pytest.raises(UsageError, match=r"has .*kl, perplexity.* alone"):
        judge([report], gate=asked)


def test_a_ratio_to_nothing_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kl has no ratio"):
        judge([output / "reports/bench-ort-cpu-fp32.json"], gate=gate(tmp_path, 'kl: "<=1.5x"'))
