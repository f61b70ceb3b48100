"""Two models side by side: within one report, or the candidates of two.

Within one report both took turns, and the interval is of their ratio at equal pace. The
candidates of two reports did not: their interval is of an unpaired bootstrap, and only reports of
the same device, runtime and workload are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dotexport.errors import UsageError

from .intervals import STATISTICS, Estimate, alone, interleaved, unpaired
from .sides import BASELINE, LABELLED, ON_ROWS, OTHER, QUALITY, RATES, Report, Side, differences

NORMAL = 1.96  # standard errors of a 95 % interval
DRIFT = 0.05  # between the baselines of two reports, from which on it is worth a word


@dataclass(frozen=True)
class Compared:
    """A model and what it is held against.

    Attributes:
        report: of the model in question, which is its candidate.
        reference: an earlier report, whose candidate it is held against; None: the baseline of
            its own.
        notes: what to keep in mind when reading the figures.
    """

    report: Report
    reference: Report | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.report.label

    @property
    def interval(self) -> str:
        """How intervals of ratios were made."""
        if self.reference is None:
            return "both took turns; bootstrap over whole turns at equal pace"
        return "measured apart; unpaired bootstrap, which cannot know what differed between runs"

    @property
    def other(self) -> Side:
        return self.reference.candidate if self.reference else self.report.baseline

    @property
    def known(self) -> list[str]:
        """Figures that both have, sorted."""
        figures = set(self.report.candidate.figures) & set(self.other.figures)
        return sorted(figures | {name for name in QUALITY if name in self.report.quality})

    def value(self, figure: str) -> Estimate:
        """The model's own figure, in the unit that its name says."""
        if figure in QUALITY:
            return Estimate(self.own(figure))
        side, value = self.report.candidate, self.own(figure)
        sampled = side.sampled(figure)
        if sampled is None:
            return Estimate(value)
        times_GS, statistic = sampled
        found = alone(times_GS, STATISTICS[statistic], rounds=side.rounds, seed=self.report.seed)
        return found.inverted(value * found.value) if figure in RATES else found

    def ratio(self, figure: str) -> Estimate:
        """The model's figure over that of what it is held against.

        Raises:
            UsageError: the other one has none, or it is 0.
        """
        if figure in QUALITY:
            return self._quality_ratio(figure)
        ours, theirs = self.report.candidate, self.other
        ours_GS, theirs_GS = ours.sampled(figure), theirs.sampled(figure)
        if ours_GS is None or theirs_GS is None:
            return Estimate(_over(figure, ours.figures[figure], theirs.figures[figure]))
        measure = interleaved if self.reference is None else unpaired
        statistic = STATISTICS[ours_GS[1]]
        found = measure(
            ours_GS[0],
            theirs_GS[0],
            statistic,
            rounds=(ours.rounds, theirs.rounds),
            seed=self.report.seed,
        )
        return found.inverted() if figure in RATES else found

    def own(self, figure: str) -> float:
        """The model's own figure as its report has it."""
        of = self.report.quality if figure in QUALITY else self.report.candidate.figures
        return float(of[figure])

    def others(self, figure: str) -> float | None:
        """The figure of what it is held against, in the same unit; None: it has none."""
        if figure not in QUALITY:
            return self.other.figures.get(figure)
        if self.reference is not None:
            return self.reference.quality.get(figure)
        if figure.startswith(LABELLED):
            return self.report.quality.get(BASELINE + figure)
        name = figure.removeprefix(OTHER)
        if name == "perplexity":
            return self.report.quality.get(figure.removesuffix(name) + BASELINE + name)
        return 0.0 if name == "kl" else 1.0  # of the original beside itself

    def _quality_ratio(self, figure: str) -> Estimate:
        ours = self.report.quality
        ratio = _over(figure, ours[figure], self.others(figure))
        text = figure.removesuffix("perplexity")
        error = ours.get(f"{text}log_ratio_error")
        if self.reference is not None or text == figure or error is None:
            return Estimate(ratio)
        # As many windows as the error was estimated from; see quality.Quality.
        factor = math.exp(NORMAL * error)
        return Estimate(
            ratio, ratio / factor, ratio * factor, int(ours.get(f"{text}num_windows", 0))
        )


def _over(figure: str, ours: float, theirs: float | None) -> float:
    if not theirs:
        raise UsageError(
            f"{figure} has no ratio: what it is compared with has "
            f"{'none' if theirs is None else theirs}; give an absolute limit without x"
        )
    return ours / theirs


def within(reports: Sequence[Report]) -> list[Compared]:
    """The candidate of each report against its baseline."""
    return [Compared(report) for report in reports]


def between(
    before: Sequence[Report], after: Sequence[Report], *, force: bool = False
) -> list[Compared]:
    """The candidates of `after` against those of `before`, workload by workload.

    Raises:
        UsageError: other devices, runtimes or workloads, with all differences; or, if forced, a
            workload without a partner.
    """
    return [
        Compared(ours, theirs, tuple(_notes(ours, theirs, force)))
        for ours, theirs in _pairs(before, after)
    ]


def _pairs(before: Sequence[Report], after: Sequence[Report]) -> Iterator[tuple[Report, Report]]:
    if len(before) == len(after) == 1:
        yield after[0], before[0]
        return
    earlier = {report.label: report for report in before}
    for report in after:
        if report.label not in earlier:
            raise UsageError(
                f"{report.file} measured {report.label}, which {before[0].file} lacks; it has: "
                f"{'; '.join(earlier)}"
            )
        yield report, earlier[report.label]


def _notes(ours: Report, theirs: Report, force: bool) -> Iterator[str]:
    found = differences(ours.conditions, theirs.conditions)
    if found and not force:
        raise UsageError(
            f"{theirs.file} and {ours.file} were not measured alike; expected the same device, "
            "runtime and workload, or --force\n" + "\n".join(f"  {line}" for line in found)
        )
    yield from (f"compared by force although they differ: {line}" for line in found)
    if drift := _drift(ours.baseline, theirs.baseline):
        yield drift


def _drift(ours: Side, theirs: Side) -> str | None:
    """The same baseline in both reports tells how far the machine itself moved in between."""
    same = ("num_parameters", "artifact_bytes")
    if any(ours.figures.get(name) != theirs.figures.get(name) for name in same):
        return None
    timed = (f"median_{metric}_ms" for metric in ("tpot", "step", "call"))
    name = next((name for name in timed if name in ours.figures), None)
    if name is None or not theirs.figures.get(name):
        return None
    ratio = ours.figures[name] / theirs.figures[name]
    if abs(ratio - 1) < DRIFT:
        return None
    return (
        f"the baseline, the same in both, took {ratio:.2f}x of its earlier time ({name}): the "
        "machine itself moved between the two runs by about as much"
    )


def summary(compared: Compared) -> dict[str, Any]:
    """Every figure with its ratio, for JSON; intervals of those that are usually asked for."""
    figures: Mapping[str, float] = compared.report.candidate.figures
    return {
        "label": compared.label,
        "file": str(compared.report.file),
        "reference": str(compared.reference.file) if compared.reference else None,
        "interval": compared.interval,
        "notes": list(compared.notes),
        "conditions": dict(compared.report.conditions),
        "figures": {**figures, **compared.report.quality},
        "ratios": {name: as_dict(found) for name, found in headline(compared).items()},
    }


def headline(compared: Compared) -> dict[str, Estimate]:
    """Ratios of what is usually asked for first."""
    asked = (
        *(name for name in RATES if not name.endswith("throughput")),
        *(f"p50_{metric}_ms" for metric in ("ttft", "tpot", "e2el", "step", "whole", "call")),
        *(f"p90_{metric}_ms" for metric in ("ttft", "tpot")),
        "peak_rss_bytes",
        "artifact_bytes",
        *("perplexity", "other_perplexity", "cosine", "recall_at_10"),
        *(LABELLED + name for name in ON_ROWS),
    )
    found = {}
    for name in asked:
        try:
            if name in compared.known:
                found[name] = compared.ratio(name)
        except UsageError:  # the other one was not evaluated, or reports 0
            continue
    return found


def as_dict(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "groups": found.groups}
