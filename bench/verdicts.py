"""The compare verb: reports in, comparisons and the verdict of a gate out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dotexport.errors import UsageError

from .comparison import Compared, between, headline, summary, within
from .gate import DOUBT, MET, Limit, Line, hold, read_gate
from .intervals import WIDEST, Estimate
from .result import BenchResult
from .sides import of_result, quality_of, read_reports, said
from .statistics import ENOUGH_GROUPS

WEAK = (
    f"weak: fewer than {ENOUGH_GROUPS} groups, or wider than {WIDEST:.0%} to each side; a gate "
    "then goes by the figure alone"
)
STYLES = {MET: "green", DOUBT: "yellow"}


@dataclass(frozen=True)
class Judgement:
    """What was compared, and what the gate says of it."""

    comparisons: tuple[Compared, ...]
    lines: tuple[Line, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What to keep in mind when reading the figures, once each."""
        notes = [f"intervals of ratios: {compared.interval}" for compared in self.comparisons]
        notes += [note for compared in self.comparisons for note in compared.notes]
        return list(dict.fromkeys(notes))

    @property
    def properties(self) -> dict[str, str]:
        """Device, runtime and workload, for reports of other tools."""
        conditions = self.comparisons[-1].report.conditions
        files = {"report": str(self.comparisons[-1].report.file)}
        return files | {name: said(value) for name, value in conditions.items()}

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": "dotexport.compare/1",
            "passed": all(line.passed for line in self.lines),
            "comparisons": [summary(compared) for compared in self.comparisons],
            "gate": [line.as_dict() for line in self.lines],
        }


def judge(
    files: Sequence[Path],
    *,
    gate: Path | None = None,
    rule: str | None = None,
    quality: Sequence[Path] = (),
    force: bool = False,
) -> Judgement:
    """Compare what one report measured, or the candidate of a second with that of the first.

    Args:
        files: one report or two, the older one first.
        gate: YAML file of limits; see gate.py.
        rule: of all limits, whatever the file says.
        quality: output or evaluation of each report; one alone is that of the last.
        force: compare even other devices, runtimes and workloads.

    Raises:
        UsageError: no report, nothing to compare, or a gate that asks for what is not there.
    """
    limits = read_gate(gate, rule) if gate else []
    if len(quality) > len(files):
        raise UsageError(f"{len(quality)} --quality for {len(files)} reports; give one for each")
    given = [None] * (len(files) - len(quality)) + list(quality)
    reports = [read_reports(file, judged) for file, judged in zip(files, given, strict=True)]
    found = within(reports[0]) if len(reports) == 1 else between(*reports, force=force)
    return Judgement(tuple(found), tuple(hold(limits, found)))


def judge_results(results: Sequence[BenchResult], limits: Sequence[Limit], file: Path) -> Judgement:
    """The same for what was just measured and lies, or would lie, in `file`."""
    quality = quality_of(file, None)
    found = tuple(Compared(of_result(result, file, quality)) for result in results)
    return Judgement(found, tuple(hold(limits, found)))


def render_verdict(judgement: Judgement) -> Group:
    """Tables of the figures and of the gate, and what to keep in mind."""
    tables = [_figures(compared) for compared in judgement.comparisons]
    if judgement.lines:
        tables.append(gate_table(judgement.lines))
    return Group(*tables, Text(WEAK), *(Text(f"note: {note}") for note in judgement.notes))


def _figures(compared: Compared) -> Table:
    reference = compared.reference
    against = f"{reference.file}" if reference else "its baseline"
    table = Table(title=escape(f"{compared.label}: {compared.report.file} against {against}"))
    for column in ("", "this", "that", "ratio", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in headline(compared).items():
        values = (compared.own(name), compared.others(name) or 0.0)
        table.add_row(name, *(f"{v:,.4g}" for v in values), f"{found.value:.3f}x", _bounds(found))
    return table


def _bounds(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{found.low:.3f} to {found.high:.3f}" + ("" if found.trusted else " (weak)")


def gate_table(lines: Sequence[Line]) -> Table:
    """Each limit, what was found, and the verdict."""
    several = len({line.of for line in lines}) > 1
    table = Table(*(["of"] if several else []), "limit", "found", "verdict", "", title="gate")
    for line in lines:
        style = STYLES.get(line.outcome, "bold red")
        verdict = f"[{style}]{line.outcome}[/]"
        cells = [line.of] if several else []
        cells += [str(line.limit), line.said]
        table.add_row(*map(escape, cells), verdict, line.reason)
    return table
