"""A gate: limits that a comparison must keep, read from a YAML file, and the verdict on each.

    decode_tok_s: ">=1.15x"          # relative: over the baseline, or over the earlier report
    ttft_p90: ["<=1.0x", "<=50ms"]   # absolute: the model's own figure
    peak_rss: "<=2GB"
    perplexity: "<=1.10x"
    rule: doubt-passes               # or point, or strict; also for one line: {limit:, rule:}

Rules say what becomes of noise. `point` looks at the figure alone. `doubt-passes`, the default,
misses a limit only where the whole 95 % interval lies beyond it: a build that equals the last one
does not fail every other time on "<=1.0x". Where the interval says little (fewer than 8 groups,
or wider than a tenth to each side) the figure alone decides, so a noisy machine excuses nothing.
`strict` passes only what the whole interval shows.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotexport.errors import GateError, UsageError
from dotexport.storage.reading import brief, read_yaml

from .comparison import Compared
from .intervals import Estimate
from .result import METRICS
from .sides import OTHER, QUALITY

RULES = ("doubt-passes", "point", "strict")
MET, DOUBT, MISSED = "met", "in doubt", "missed"

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
LIMIT = re.compile(
    r"\s*(>=|<=|>|<)\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*"
)
# Figures of the report are in the unit that ends their name; a limit may be in another.
UNITS = {
    "bytes": {
        "B": 1.0,
        **{f"{p}B": 1e3**n for n, p in enumerate("KMGT", 1)},
        **{f"{p}iB": 1024.0**n for n, p in enumerate("KMGT", 1)},
    },
    "ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "s": {"ms": 1e-3, "s": 1.0},
}
ALIASES = {
    "peak_rss": "peak_rss_bytes",
    "peak_device": "peak_device_bytes",
    "parameters": "num_parameters",
    "top1": "top1_agreement",
}
SHORT = re.compile(r"([a-z0-9]+)_(mean|median|std|p[0-9]+)(?:_ms)?")
LONG = re.compile(r"(mean|median|std|p[0-9]+)_([a-z0-9]+)(?:_ms)?")


@dataclass(frozen=True)
class Limit:
    """One line of a gate.

    Attributes:
        name: of the figure, as the file has it.
        text: of the limit, as the file has it.
        value: the limit; relative, or in the unit of the figure.
    """

    name: str
    text: str
    comparator: str
    value: float
    relative: bool
    rule: str

    @property
    def figure(self) -> str:
        return figure_of(self.name)

    def holds(self, found: float) -> bool:
        return OPERATORS[self.comparator](found, self.value)

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


@dataclass(frozen=True)
class Line:
    """A limit and what was found."""

    limit: Limit
    found: Estimate
    outcome: str
    of: str
    """Which workload of a sweep, and of which runtime."""

    @property
    def passed(self) -> bool:
        return self.outcome != MISSED

    @property
    def said(self) -> str:
        """What was found, in the unit of the limit, with its interval."""
        limit, found = self.limit, self.found
        text = _number(found.value, limit)
        if found.low is not None and found.high is not None:
            text += f" ({_number(found.low, limit)} to {_number(found.high, limit)})"
        return text

    @property
    def reason(self) -> str:
        """Why the line came out as it did."""
        if self.outcome == DOUBT:
            return "the figure misses the limit, its interval does not: passed, in doubt"
        if self.outcome == MET:
            return ""
        if self.limit.holds(self.found.value):
            return "strict: the interval does not show that the limit is kept"
        return "beyond the limit" + (", with all of its interval" if self._wholly else "")

    @property
    def _wholly(self) -> bool:
        bounds = (self.found.low, self.found.high)
        return not any(bound is None or self.limit.holds(bound) for bound in bounds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "metric": self.limit.name,
            "figure": self.limit.figure,
            "limit": self.limit.text,
            "rule": self.limit.rule,
            "found": self.found.value,
            "low": self.found.low,
            "high": self.found.high,
            "verdict": self.outcome,
            "reason": self.reason,
        }


def read_gate(file: Path, rule: str | None = None) -> list[Limit]:
    """The limits of a gate file.

    Args:
        rule: for every line, whatever the file says.

    Raises:
        UsageError: no such file, not YAML, or something that is no limit.
    """
    content = read_yaml(file, what=f"gate {file}")
    return parse_gate(content, str(file), rule)


def parse_gate(content: Any, where: str, rule: str | None = None) -> list[Limit]:
    if not isinstance(content, Mapping):
        raise UsageError(f'{where} must map figures to limits, e.g. decode_tok_s: ">=1.15x"')
    lines = {str(key): value for key, value in content.items()}
    common = _rule(lines.pop("rule", RULES[0]), where)
    limits = [
        limit
        for name, value in lines.items()
        for limit in _limits(name, value, f"{where}: {name}", common, rule)
    ]
    if not limits:
        raise UsageError(f"{where} has no limits; a gate that asks nothing is always met")
    return limits


def hold(limits: Iterable[Limit], comparisons: Iterable[Compared]) -> list[Line]:
    """Each limit held against each comparison.

    Raises:
        UsageError: a figure that no report has, with those that there are.
    """
    asked = list(limits)
    return [_judge(limit, compared) for compared in comparisons for limit in asked]


def require(lines: Iterable[Line]) -> None:
    """Raise for the limits that were missed.

    Raises:
        GateError: with every one of them.
    """
    missed = [line for line in lines if not line.passed]
    if missed:
        said = (f"  {line.of}: {line.limit}: found {line.said}; {line.reason}" for line in missed)
        raise GateError(f"the gate was missed by {len(missed)}\n" + "\n".join(said))


def figure_of(name: str) -> str:
    """The report's name for a figure: ttft_p90 and p90_ttft are p90_ttft_ms."""
    if name in ALIASES:
        return ALIASES[name]
    if match := SHORT.fullmatch(name):
        return f"{match[2]}_{match[1]}_ms"
    match = LONG.fullmatch(name)
    return f"{match[1]}_{match[2]}_ms" if match else name


def verdict(limit: Limit, found: Estimate) -> str:
    """What the rule of a limit makes of a figure with this interval."""
    kept = limit.holds(found.value)
    bounds = [bound for bound in (found.low, found.high) if bound is not None]
    if limit.rule == "strict":
        shown = all(limit.holds(bound) for bound in bounds)
        enough = not found.sampled or bool(bounds)
        return MET if kept and shown and enough else MISSED
    if kept:
        return MET
    doubtful = limit.rule == "doubt-passes" and found.trusted
    return DOUBT if doubtful and any(map(limit.holds, bounds)) else MISSED


def _judge(limit: Limit, compared: Compared) -> Line:
    if limit.figure not in compared.known:
        raise UsageError(_unknown(limit, compared))
    found = compared.ratio(limit.figure) if limit.relative else compared.value(limit.figure)
    return Line(limit, found, verdict(limit, found), compared.label)


def _unknown(limit: Limit, compared: Compared) -> str:
    if limit.figure.startswith(OTHER) and compared.report.quality:
        return (
            f"the gate asks for {limit.name}, and the evaluation of {compared.report.file} has no "
            "second text; run `dotexport eval` with --other"
        )
    if limit.figure in QUALITY and (told := set(compared.report.quality) & set(QUALITY)):
        return (
            f"the gate asks for {limit.name}, and the evaluation of {compared.report.file} has "
            f"{', '.join(sorted(map(_short, told)))} alone; ask for one of these, or give "
            "--quality the JSON of an evaluation that has it"
        )
    if limit.figure in QUALITY:
        return (
            f"the gate asks for {limit.name}, and {compared.report.file} knows no quality; give "
            "--quality OUT (after `dotexport eval OUT`) or the JSON of an evaluation"
        )
    known = sorted({_short(name) for name in [*compared.known, *QUALITY]})
    close = difflib.get_close_matches(limit.name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"the gate asks for {limit.name}, which {compared.report.file} does not have{hint}\n"
        f"known: {', '.join(known)}"
    )


def _short(figure: str) -> str:
    for alias, name in ALIASES.items():
        if name == figure:
            return alias
    match = LONG.fullmatch(figure)
    return f"{match[2]}_{match[1]}" if match and match[2] in METRICS else figure


def _limits(name: str, value: Any, where: str, common: str, forced: str | None) -> Iterator[Limit]:
    if isinstance(value, list):
        for one in value:
            yield from _limits(name, one, where, common, forced)
        return
    rule = common
    if isinstance(value, Mapping):
        if unknown := set(map(str, value)) - {"limit", "rule"}:
            raise UsageError(f"{where} has the unknown key {min(unknown)!r}; known: limit, rule")
        rule = _rule(value.get("rule", common), where)
        value = value.get("limit")
    yield _limit(name, value, where, forced or rule)


def _limit(name: str, value: Any, where: str, rule: str) -> Limit:
    match = LIMIT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UsageError(
            f'{where} must be a limit such as ">=1.15x" (over the baseline) or "<=12" (the figure '
            f"itself), in quotes; not {brief(value)}"
        )
    comparator, number, unit = match.groups()
    relative = unit == "x"
    factor = 1.0 if relative or not unit else _factor(figure_of(name), unit, where)
    return Limit(name, value.strip(), comparator, float(number) * factor, relative, rule)


def _factor(figure: str, unit: str, where: str) -> float:
    if unit == "%" and figure == "top1_agreement":
        return 0.01
    units = UNITS.get(figure.rpartition("_")[2], {})
    if unit not in units:
        allowed = ", ".join(["x", *units])
        raise UsageError(f"{where} is in {unit!r}; expected {allowed}, or a number alone")
    return units[unit]


def _rule(rule: Any, where: str) -> str:
    if rule not in RULES:
        raise UsageError(f"{where}: rule must be one of {', '.join(RULES)}, not {brief(rule)}")
    return str(rule)


def _number(value: float, limit: Limit) -> str:
    if limit.relative:
        return f"{value:.3f}x"
    if limit.figure.endswith("_bytes"):
        return f"{value / 1e6:,.2f} MB"
    unit = next((f" {u}" for u in ("ms", "s") if limit.figure.endswith(f"_{u}")), "")
    unit = "" if limit.figure.endswith("tok_s") else unit
    return f"{value:,.4g}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"
