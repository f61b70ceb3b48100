"""How sure a figure is: intervals for one model's figure, and for two that were not interleaved.

`statistics.compare` is for two models that took turns. Both resample whole groups, because
timings a second apart share most of what disturbs them.

Shapes: G groups (one A B B A each), S samples of one model in a group, U units that are drawn,
R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from .statistics import (
    ENOUGH_GROUPS,
    ENOUGH_ROUNDS,
    MAX_CELLS,
    PERCENTILES,
    Array,
    Statistic,
    _tail_probability,
    compare,
)

RESAMPLES = 2000
# Wider than a tenth to each side, an interval says that the machine was not fit for measuring.
WIDEST = 0.10

STATISTICS: dict[str, Statistic] = {
    "mean": np.mean,
    "median": np.median,
    "std": partial(np.std, ddof=1),
    **{f"p{p}": partial(np.percentile, q=p) for p in PERCENTILES},
}


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; figures that are counted, not sampled, have none.

    Attributes:
        groups: that the interval rests on; 0 where there is none.
    """

    value: float
    low: float | None = None
    high: float | None = None
    groups: int = 0

    @property
    def sampled(self) -> bool:
        return self.groups > 0

    @property
    def trusted(self) -> bool:
        """Whether the interval rests on enough, and is narrow enough to say something."""
        if self.low is None or self.high is None or self.groups < ENOUGH_GROUPS:
            return False
        return self.high - self.low <= 2 * WIDEST * abs(self.value)

    def inverted(self, numerator: float = 1.0) -> Estimate:
        """numerator / figure: a rate from a time."""
        low, high = (None if b is None else numerator / b for b in (self.high, self.low))
        return Estimate(numerator / self.value, low, high, self.groups)


def alone(times_GS: Array, statistic: Statistic, *, rounds: int = 1, seed: int = 0) -> Estimate:
    """One model's figure, with an interval for the noise within this run."""
    found = float(statistic(times_GS))
    if len(times_GS) < 2:
        return Estimate(found, groups=len(times_GS))
    drawn_R = _resampled(times_GS, rounds, statistic, np.random.default_rng(seed))
    return _estimate(found, drawn_R, len(times_GS), rounds)


def interleaved(
    candidate_GS: Array,
    baseline_GS: Array,
    statistic: Statistic,
    *,
    rounds: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Estimate:
    """Ratio of two models that took turns, at equal pace: see `statistics.compare`."""
    if min(len(candidate_GS), len(baseline_GS)) < 2 or len(candidate_GS) != len(baseline_GS):
        ratio = float(statistic(candidate_GS) / statistic(baseline_GS))
        return Estimate(ratio, groups=min(len(candidate_GS), len(baseline_GS)))
    found = compare(candidate_GS, baseline_GS, rounds=rounds[0], seed=seed, statistic=statistic)
    return Estimate(found.ratio, found.low, found.high, found.groups)


def unpaired(
    candidate_GS: Array,
    baseline_GS: Array,
    statistic: Statistic,
    *,
    rounds: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Estimate:
    """Ratio of two models measured in runs of their own.

    Each is resampled by itself, so the interval holds the noise within both runs. What differed
    between the runs (a warmer room, a neighbour) it cannot know.
    """
    ratio = float(statistic(candidate_GS) / statistic(baseline_GS))
    groups = min(len(candidate_GS), len(baseline_GS))
    if groups < 2:
        return Estimate(ratio, groups=groups)
    rng = np.random.default_rng(seed)
    above_R = _resampled(candidate_GS, rounds[0], statistic, rng)
    below_R = _resampled(baseline_GS, rounds[1], statistic, rng)
    return _estimate(ratio, above_R / below_R, groups, min(rounds))


def _resampled(
    times_GS: Array, rounds: int, statistic: Statistic, rng: np.random.Generator
) -> Array:
    units = _units(len(times_GS), rounds)
    times_US, pieces = times_GS.reshape(units, -1), []
    step = max(1, MAX_CELLS // times_GS.size)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn_RT = times_US[rng.integers(units, size=(count, units))].reshape(count, -1)
        pieces.append(statistic(drawn_RT, axis=1))
    return np.concatenate(pieces)


def _units(groups: int, rounds: int) -> int:
    """What is drawn: rounds of fresh processes if there are enough of them, else groups."""
    return rounds if rounds >= ENOUGH_ROUNDS and groups % rounds == 0 else groups


def _estimate(found: float, drawn_R: Array, groups: int, rounds: int) -> Estimate:
    tail = _tail_probability(_units(groups, rounds))
    low, high = np.quantile(drawn_R, [tail, 1 - tail])
    return Estimate(found, float(low), float(high), groups)
