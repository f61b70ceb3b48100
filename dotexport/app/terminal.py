"""What people see: tables and JSON on stdout, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dotexport.axes import AXES, axes_of

if TYPE_CHECKING:
    from dotexport.axes.plan import Plan
    from dotexport.exports.parity import Parity
    from dotexport.exports.target import TargetRow
    from dotexport.sizes.allocation import Allocation
    from dotexport.sizes.planning import Choice

stderr = Console(stderr=True)


def show_summary(out: Path, title: str) -> None:
    """The closing table of an output, and where everything lies."""
    from dotexport.outputs import summary
    from dotexport.storage import manifest

    show_rows(title, manifest.read(out), summary.paths(out))


def show_figures(rows: Iterable[Sequence[str]], narrowed: str, title: str, made: str) -> None:
    """What a card says, original beside narrowed; then what was made, and where it lies."""
    table = Table("", "original", narrowed, "change", title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    stderr.print(made, soft_wrap=True, highlight=False)


def show_frontier(found: Any, out: Path | None, *, as_json: bool) -> None:
    """A frontier of the bench: its table and verdict, and where it is kept."""
    from dotexport.app.door import benches

    Console(stderr=as_json).print(benches().render_frontier(found))
    if as_json:
        show_json(benches().frontier_as_dict(found))
    if out is not None:
        stderr.print(f"frontier {out}", soft_wrap=True, highlight=False)


def show_next(out: Path, model: str, *, multimodal: bool = False) -> None:
    """What can be done now, each with its command."""
    from dotexport.outputs import summary

    console = Console()
    for purpose, command in summary.next_commands(out, model, multimodal=multimodal):
        console.print(
            f"next: {command}  ({purpose})", soft_wrap=True, highlight=False, markup=False
        )


def show_rows(
    title: str, record: Mapping[str, Any], paths: Iterable[tuple[str, Path]] = ()
) -> None:
    """Original beside narrowed, for whatever figures a manifest holds."""
    from dotexport.outputs import summary

    console = Console()
    table = Table(title=title)
    for column in ("", "original", "narrowed", "change"):
        table.add_column(column, justify="right" if column in ("original", "narrowed") else "left")
    for row in summary.rows(record):
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for label, path in paths:
        console.print(f"{label:<24} {path}", soft_wrap=True, highlight=False)


def show_allocation(allocation: Allocation) -> None:
    """What cutting each axis alone costs, as bars, and the sizes that were measured together."""
    curves = Table("axis", "size", "parameters", "held-out KL", "", title="one axis at a time")
    largest = max((kl for curve in allocation.curves for kl in curve.divergences), default=0.0)
    for curve in allocation.curves:
        rows = zip(curve.sizes, curve.parameters, curve.divergences, strict=True)
        for size, parameters, kl in rows:
            bar = "█" * round(12 * kl / (largest or 1.0))
            curves.add_row(curve.axis, f"{size:,}", f"{parameters:,}", f"{kl:.4f}", bar)
    stderr.print(curves)
    axes = [axis for axis in AXES if axis.name in allocation.checked[0]]
    labels = (axis.label for axis in axes)
    kinds = {"predicted_kl": "predicted KL", "held_out_kl": "held-out KL"}
    if any("healed_kl" in row for row in allocation.checked):
        kinds["healed_kl"] = "behind a short distillation"
    checked = Table(*labels, "parameters", *kinds.values())
    checked.title = "together; the least was taken"
    for row in allocation.checked:
        sizes = (f"{row[key]:,}" for key in (*(axis.name for axis in axes), "parameters"))
        checked.add_row(*sizes, *(f"{row[kind]:.4f}" for kind in kinds))
    stderr.print(checked)


def show_shares(decided: Plan) -> None:
    """What each axis is a part of, and what a cut of it leaves exact."""
    table = Table("axis", "of parameters", "of KV cache", "of time per token", "what stays exact")
    table.title = "share of the original that has this axis"
    for axis in axes_of(decided.before):
        shares = axis.shares(decided.family, decided.before)
        parts = (shares.parameters, shares.cache, shares.time)
        table.add_row(axis.name, *(f"{100 * part:.0f} %" for part in parts), axis.exact)
    Console().print(table)


def show_costs(chosen: Choice) -> None:
    """What planned sizes cost in every target, and what decided them."""
    from dotexport.sizes.plan_file import on_a_command_line

    console, costs = Console(), chosen.costs
    table = Table("", "original", "narrowed", title="bytes, estimated from config.json")
    rows = {f"{name}, MB": sizes for name, sizes in costs.artifacts.items()}
    for label, sizes in rows.items():
        table.add_row(label, *(f"{size / 1e6:,.2f}" for size in sizes))
    for name, sizes in costs.cache_per_token.items():
        table.add_row(f"{name}, KV cache per token, KB", *(f"{size / 1e3:,.2f}" for size in sizes))
    table.add_row("disk for hf/ and artifacts, MB", "", f"{costs.disk / 1e6:,.2f}")
    several = costs.processes > 1
    each = f" in each of {costs.processes:,} processes" if several else ""
    table.add_row(f"peak memory of shrink{each}, MB", "", f"{costs.shrink_memory / 1e6:,.0f}")
    if several:
        table.add_row("sent between them, MB", "", f"{costs.exchanged / 1e6:,.0f}")
    table.add_row("time of shrink here", "", duration(costs.shrink_seconds))
    if costs.allocation_seconds:
        alone = ", by one process" if several else ""
        table.add_row(f"and of measuring cuts first{alone}", "", duration(costs.allocation_seconds))
    if costs.distillation_seconds:
        table.add_row("and of distilling behind it", "", duration(costs.distillation_seconds))
    console.print(table)
    if costs.allocation_seconds:
        console.print(
            "these sizes are the rule's; shrink measures cuts first, "
            f"judged {costs.judged}, and may take others within the same budget: --plan FILE or "
            "--allocate rule keeps to these",
            soft_wrap=True,
        )
    before, after = chosen.plan.architectures
    if before != after:
        console.print(f"written as {after}, which computes the same as {before}", soft_wrap=True)
    if chosen.vocabulary:
        (before, after), why = chosen.vocabulary["tokens"], chosen.vocabulary["kept"]
        groups = ", ".join(f"{count:,} {group}" for group, count in why.items())
        console.print(f"{after:,} of {before:,} tokens stay: {groups}", soft_wrap=True)
    flags = on_a_command_line(chosen.flags)
    console.print(f"shrink to them with {flags}", soft_wrap=True, highlight=False)
    if chosen.binding:
        console.print(f"decided by {'; '.join(chosen.binding)}", soft_wrap=True, highlight=False)


def show_latency(content: Mapping[str, Any], file: Path) -> None:
    """A measured table: each size, and how far it is off where it was not measured."""
    console = Console()
    original = content["original"]
    depth = content["layers"]
    title = f"time over the original's, {content['target']}:{content['precision']}"
    labels = (axis.label for axis in AXES if axis.name in content["rows"][0])
    table = Table(*labels, "batch", "decode", "prefill", title=title)
    for row in content["rows"]:
        if row["layers"] == depth["measured"]:
            table.add_row(*_latency_cells(row))
    for row in content["held_out"]:
        table.add_row(*_latency_cells(row), end_section=True)
    console.print(table)
    for batch, times in original.items():
        console.print(
            f"original, batch {batch}: {times['decode_ms']:.3f} ms per token, "
            f"{times['prefill_ms']:.3f} ms per prompt of {content['workload']['prompt']}"
        )
    if depth["shallow"]:
        console.print(
            f"measured with {depth['measured']} and {depth['shallow']} layers of {depth['model']}"
        )
    for row in content["skipped"]:
        console.print(f"skipped: {escape('; '.join(row['problems']))}", soft_wrap=True)
    console.print(f"{'latency table':<24} {file}", soft_wrap=True, highlight=False)


def _latency_cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Sizes and ratios; of a held-out size, what the table says beside it."""
    for name in (*(axis.name for axis in AXES if axis.name in row), "batch"):
        yield f"{row[name]:,}"
    for metric in ("decode", "prefill"):
        found = row[metric]
        said = f", table says {found['predicted']:.3f}" if "predicted" in found else ""
        yield f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f}){said}"


def duration(seconds: float) -> str:
    """To the precision of an estimate.

    >>> duration(42.3), duration(250), duration(500), duration(90_000), duration(900_000)
    ('42 s', '4.2 min', '8.3 min', '25 h', '250 h')
    """
    scales = ((6000, 3600, "h"), (100, 60, "min"), (0, 1, "s"))
    unit, name = next((unit, name) for least, unit, name in scales if seconds >= least)
    value = seconds / unit
    return f"{value:.0f} {name}" if value >= 100 else f"{value:.2g} {name}"


def show_parities(parities: Iterable[Parity]) -> None:
    """What each artifact differs from torch, the limit it is held to, and the verdict."""
    columns = ("artifact", "worst logit", "same rounding", "KL, nats", "top-1", "verdict")
    table = Table(*columns, title="difference from torch (limit)")
    for parity in parities:
        limits = parity.limits
        figures = (
            (parity.max_abs, limits.max_abs),
            (parity.rounding, limits.rounding),
            (parity.kl, limits.kl),
            (parity.top1, limits.top1),
        )
        said = parity.problems or (parity.unverified or "passed",)
        verdict = "; ".join(said)
        table.add_row(parity.artifact, *(_held(*pair) for pair in figures), escape(verdict))
    stderr.print(table)


def _held(figure: float | None, limit: float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:.2g}" if limit is None else f"{figure:.2g} ({limit:.2g})"


def missing_here(row: TargetRow) -> str:
    """What keeps a target from being used here, or from being run."""
    if row.lacking:
        return f"nothing to write it; to run it, {'; '.join(row.lacking)}"
    return "; ".join(row.missing) or "nothing"


def show_diagnosis(diagnosis: Any) -> None:
    """Packages, devices, targets, and what is wrong with them."""
    console = Console()
    packages = Table("runtime", "version", "can compute on")
    for name, number in diagnosis.packages.items():
        devices = diagnosis.providers.get(name.removesuffix("-gpu"), ())
        packages.add_row(name, number, ", ".join(devices))
    console.print(packages)
    targets = Table("target", "precisions", "missing here")
    for row in diagnosis.targets:
        targets.add_row(row.name, ", ".join(row.precisions), escape(missing_here(row)))
    console.print(targets)
    for finding in diagnosis.findings:
        console.print(f"[bold red]problem:[/] {escape(finding.problem)}", soft_wrap=True)
        console.print(f"[bold]mend:[/] {escape(finding.mend)}", soft_wrap=True)


def show_written(home: Path, names: Iterable[str], *, as_json: bool) -> None:
    """Artifacts of an output, and how large they are."""
    from dotexport.storage import manifest

    made = manifest.read(home)["artifacts"]
    if as_json:
        show_json({name: made[name] for name in names})
        return
    for name in names:
        note = "" if made[name]["parity"] else "  not verified"
        size = f"{made[name]['bytes'] / 1e6:.2f} MB{note}"
        stderr.print(f"{home / name}  {size}", soft_wrap=True, highlight=False)


def show_json(document: Any) -> None:
    """One document, one line."""
    sys.stdout.write(json.dumps(document) + "\n")


def show_error(message: str) -> None:
    """In red; what no UTF-8 can hold, such as a name of another encoding, as an escape."""
    message = message.encode("utf-8", "backslashreplace").decode()
    stderr.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
