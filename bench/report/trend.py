"""How figures developed: a history drawn, each device, runtime and workload apart."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Canvas

from dotexport.errors import UsageError
from dotexport.storage.files import write_text

from ..gate import Limit, figure_of
from ..history import Entry, read
from ..intervals import Estimate
from ..sides import said
from .collected import slug
from .page import page
from .plots import BASELINE, CANDIDATE, DPI, HEIGHT, WIDTH, Cell, Plot, axes, styled

USUAL = ("decode_tok_s", "p50_ttft_ms", "p50_step_ms", "peak_rss_bytes", "perplexity")
TICKS = 5


class Asked(NamedTuple):
    """A figure to draw: of the model itself, or over what it was compared with."""

    name: str
    figure: str
    relative: bool

    @property
    def label(self) -> str:
        return f"{self.name}, over the reference" if self.relative else self.name


class Group(NamedTuple):
    """Entries of one device, runtime and workload, oldest first."""

    title: str
    conditions: dict[str, str]
    plots: list[Plot]


def write_trend(
    file: Path, out: Path, *, limits: Sequence[Limit] = (), metrics: Sequence[str] = ()
) -> None:
    """Draw a history into an HTML page, a picture, or a table.

    Args:
        limits: of a gate; drawn, and its figures are what is shown.
        metrics: figures to show instead.

    Raises:
        UsageError: an unknown kind of file, no history, or a figure that no entry has.
    """
    kinds = {".html": _page, ".png": _picture, ".svg": _picture, ".csv": _table}
    if out.suffix not in kinds:
        raise UsageError(f"{out} ends in {out.suffix or 'nothing'}; expected {', '.join(kinds)}")
    entries = read(file)
    groups = list(_groups(entries, _asked(entries, limits, metrics), limits))
    kinds[out.suffix](out, groups)


def _asked(
    entries: Sequence[Entry], limits: Sequence[Limit], metrics: Sequence[str]
) -> list[Asked]:
    if metrics:
        wanted = [_known(name, entries) for name in metrics]
    elif limits:
        wanted = [Asked(limit.name, limit.figure, limit.relative) for limit in limits]
    else:
        wanted = [
            Asked(name, name, True) for name in USUAL if any(name in e.ratios for e in entries)
        ]
    return list(dict.fromkeys(wanted))


def _known(name: str, entries: Sequence[Entry]) -> Asked:
    figure = figure_of(name)
    if any(figure in entry.ratios for entry in entries):
        return Asked(name, figure, True)
    if any(figure in entry.figures for entry in entries):
        return Asked(name, figure, False)
    known = sorted({key for entry in entries for key in (*entry.ratios, *entry.figures)})
    raise UsageError(f"no entry of the history has {name}; known: {', '.join(known)}")


def _groups(
    entries: Sequence[Entry], asked: Sequence[Asked], limits: Sequence[Limit]
) -> Iterator[Group]:
    apart: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        apart.setdefault((entry.device, entry.label), []).append(entry)
    for (device, label), mine in apart.items():
        conditions = {name: said(value) for name, value in mine[-1].conditions.items()}
        title = f"{label} on {conditions.get('cpu', 'an unknown device')}"
        plots = [plot for one in asked if (plot := _plot(one, mine, limits, f"{device} {label}"))]
        yield Group(title, conditions, plots)


def _plot(
    asked: Asked, entries: Sequence[Entry], limits: Sequence[Limit], where: str
) -> Plot | None:
    found = [(entry, value) for entry in entries if (value := _value(asked, entry)) is not None]
    if not found:
        return None
    held = [m for m in limits if m.figure == asked.figure and m.relative == asked.relative]
    last = found[-1][1]
    rows: list[tuple[Cell, ...]] = [
        (
            entry.time.strftime("%Y-%m-%d %H:%M"),
            (entry.commit or "")[:12],
            float(f"{value.value:.5g}"),
            None if value.low is None else float(f"{value.low:.5g}"),
            None if value.high is None else float(f"{value.high:.5g}"),
        )
        for entry, value in found
    ]
    limit = f"The gate asks for {', '.join(m.text for m in held)}." if held else ""
    return Plot(
        name=slug(f"{where} {asked.name} {'x' if asked.relative else ''}"),
        title=asked.label,
        alt=f"{len(found)} entries; the first is {found[0][1].value:.4g}, the last "
        f"{last.value:.4g}. {limit}",
        columns=("time, UTC", "commit", asked.name, "low", "high"),
        rows=tuple(rows),
        draw=lambda canvas: _draw(canvas, found, held, asked),
        note=("Bars are 95 % intervals. " if last.low is not None else "") + limit,
    )


def _value(asked: Asked, entry: Entry) -> Estimate | None:
    if asked.relative:
        return entry.ratios.get(asked.figure)
    value = entry.figures.get(asked.figure)
    return None if value is None else Estimate(value)


def _draw(
    canvas: Any, found: Sequence[tuple[Entry, Estimate]], limits: Sequence[Limit], asked: Asked
) -> None:
    megabytes = not asked.relative and asked.figure.endswith("_bytes")
    unit, label = (1e6, "MB") if megabytes else (1, "ratio" if asked.relative else asked.figure)
    with axes(canvas, x="", y=label) as panel:
        at = range(len(found))
        middle = [v.value / unit for _, v in found]
        low = [(v.value - (v.value if v.low is None else v.low)) / unit for _, v in found]
        high = [((v.value if v.high is None else v.high) - v.value) / unit for _, v in found]
        errors = [[max(0.0, e) for e in side] for side in (low, high)]
        panel.errorbar(
            at,
            middle,
            yerr=errors,
            fmt="-o",
            color=CANDIDATE,
            markersize=5,
            elinewidth=1.2,
            linewidth=1.4,
        )
        for limit in limits:
            panel.axhline(
                limit.value / unit,
                color=BASELINE,
                linestyle="--",
                linewidth=1.4,
                label=f"gate {limit.text}",
            )
        step = max(1, -(-len(found) // TICKS))
        shown = list(at)[::-step][::-1]  # the newest one always
        panel.set_xticks(shown, [_when(found[n][0]) for n in shown])
        panel.margins(x=0.06, y=0.2)


def _when(entry: Entry) -> str:
    commit = f"\n{entry.commit[:7]}" if entry.commit else ""
    return f"{entry.time:%m-%d %H:%M}{commit}"


def _page(out: Path, groups: Sequence[Group]) -> None:
    write_text(out, page("trend.html.j2", title="How figures developed", groups=groups))


def _picture(out: Path, groups: Sequence[Group]) -> None:
    plots = [(group.title, plot) for group in groups for plot in group.plots]
    columns = min(2, len(plots))
    rows = -(-len(plots) // columns)
    with styled():
        canvas = Canvas(figsize=(WIDTH * columns, (HEIGHT + 0.5) * rows))
        parts = canvas.subfigures(rows, columns, squeeze=False).flat
        for (title, plot), part in zip(plots, parts, strict=False):
            plot.draw(part)
            part.suptitle(f"{plot.title}\n{title}", fontsize=9)
        written = io.BytesIO()
        canvas.savefig(written, format=out.suffix[1:], dpi=DPI)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(written.getvalue())


def _table(out: Path, groups: Sequence[Group]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["of", "figure", "time", "commit", "value", "low", "high"])
    for group in groups:
        for plot in group.plots:
            writer.writerows([group.title, plot.title, *row] for row in plot.rows)
    write_text(out, stream.getvalue())
