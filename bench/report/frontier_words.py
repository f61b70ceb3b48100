"""What a frontier says: a table, one plot, and the verdict in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dotexport.storage.files import write_json, write_text

from ..frontier_points import ORIGINAL, REPORT, SCHEMA, Artifact, Frontier, Point
from .plots import BASELINE, MARKERS, MUTED, Plot, axes, colours, log_scale, significant

FLOOR = 1e-6  # what is closer is drawn here, on a logarithmic axis


def verdict(found: Frontier[Any]) -> list[str]:
    """For bytes alone; beside rivals; then for each rate that was timed."""
    rates = (s for name in found.points[0].rates for s in _on_rate(found, name))
    return [*_on_bytes(found), *_on_rivals(found), *rates]


def _on_bytes(found: Frontier[Any]) -> Iterator[str]:
    originals, others = _parted(found.points)
    smallest = min(point.num_bytes for point in originals)
    best = [point for point in others if point in found.best]
    ahead = [p for p in best if p.num_bytes >= smallest and not _as_good(originals, p)]
    for point in ahead:
        yield (
            f"For bytes, narrowing pays: {_told(point)}, and nothing of the original is both as "
            "small and as close."
        )
    if others and not ahead:
        kept = ", ".join(p.precision for p in originals if p in found.best)
        yield (
            f"For bytes alone, quantise the original ({kept}): at equal bytes nothing narrowed is "
            f"ahead{_beside(originals, others)}."
        )
    for point in best:
        if point.num_bytes < smallest:
            yield f"Smaller than anything of the original: {_told(point)}."


def _as_good(originals: Sequence[Artifact], point: Artifact) -> list[Artifact]:
    """Those that are no larger and no further on the mean of all texts: the frontier asks each text
    alone, and a hair on one of them is no reason to narrow."""
    return [p for p in originals if p.num_bytes <= point.num_bytes and p.distance <= point.distance]


def _beside(originals: Sequence[Artifact], others: Sequence[Artifact]) -> str:
    """The closest narrowed artifact that one of the original is as good as, and the smallest that
    is."""
    for point in sorted(others, key=_first):
        if better := _as_good(originals, point):
            smallest = min(better, key=lambda p: p.num_bytes)
            return f"; beside {_told(point)} stands {_told(smallest)}"
    return ""


def _on_rivals(found: Frontier[Any]) -> Iterator[str]:
    """Of each rival: whether it is as small and reads as well as what was narrowed, or not."""
    points = [point for point in found.points if isinstance(point, Point)]
    ours = [point for point in points if not point.rival]
    narrowed = [point for point in ours if point.model != ORIGINAL]
    for name in dict.fromkeys(point.model for point in points if point.rival):
        theirs = [point for point in points if point.model == name]
        left = [p for p in narrowed if not any(q.reads_better(p) for q in theirs)]
        stand = [p for p in theirs if not any(q.reads_better(p) for q in ours)]
        if narrowed and not left:
            best = min(narrowed, key=lambda p: p.texts[0].bits_per_byte)
            better = min(
                (p for p in theirs if p.reads_better(best)), key=lambda p: p.texts[0].bits_per_byte
            )
            yield (
                f"Take {name}: each narrowed artifact is beaten by one of it that is no larger and "
                f"reads every text better; beside {_in_bits(best)} stands {_in_bits(better)}."
            )
        elif not stand:
            worst = max(theirs, key=lambda p: -p.texts[0].bits_per_byte)
            better = min((p for p in ours if p.reads_better(worst)), key=lambda p: p.num_bytes)
            yield (
                f"{name} is behind: each artifact of it is beaten by one of ours that is no larger "
                f"and reads every text better; beside {_in_bits(worst)} stands {_in_bits(better)}."
            )
        else:
            theirs_kept, ours_kept = (", ".join(p.name for p in some) for some in (stand, left))
            yield (
                f"Beside {name} it depends on the size: nothing of ours is as small and reads as "
                f"well as {theirs_kept}" + (f", nothing of it as {ours_kept}." if left else ".")
            )


def _in_bits(point: Point) -> str:
    bits = " and ".join(f"{text.bits_per_byte:.3f}" for text in point.texts)
    return f"{point.name} ({point.num_bytes / 1e6:,.2f} MB, {bits} bits per byte)"


def _on_rate(found: Frontier[Any], name: str) -> Iterator[str]:
    timed = [point for point in found.points if point.rates[name]]
    originals, others = _parted(timed)
    if not originals or not others:
        return
    first, second = (
        max(points, key=lambda p: median(p.rates[name])) for points in (others, originals)
    )
    ours, theirs = first.rates[name], second.rates[name]
    ratio = median(ours) / median(theirs)
    rates = f"{first.name} {median(ours):,.1f} {first.unit}, {second.name} {median(theirs):,.1f}"
    measure = first.texts[0].measure
    closeness = f"{measure} {_said(first.texts[0])} and {_said(second.texts[0])}"
    if min(ours) > max(theirs):
        yield f"For {name}, narrow: {ratio:.2f}x in every round ({rates}; {closeness})."
    elif max(ours) < min(theirs):
        yield f"For {name}, narrowing loses: {ratio:.2f}x in every round ({rates})."
    else:
        yield f"For {name}, no gain that shows in every round: {ratio:.2f}x ({rates})."


def _parted(points: Sequence[Artifact]) -> tuple[list[Artifact], list[Artifact]]:
    return (
        [p for p in points if p.model == ORIGINAL],
        [p for p in points if p.model != ORIGINAL and not p.rival],
    )


def _first(point: Artifact) -> float:
    """Distance on the first text."""
    return point.texts[0].distance or 0.0


def _said(text: Any) -> str:
    return f"{text.figures[text.measure]:.4f}"


def _told(point: Artifact) -> str:
    figures = " and ".join(map(_said, point.texts))
    return f"{point.name} ({point.num_bytes / 1e6:,.2f} MB, {point.texts[0].measure} {figures})"


def frontier_as_dict(found: Frontier[Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "target": found.target,
        "points": [{**asdict(p), "on_frontier": p in found.best} for p in found.points],
        "skipped": list(found.skipped),
        "notes": list(found.notes),
        "workload": found.workload and found.workload.as_dict(),
        "verdict": verdict(found),
    }


def render_frontier(found: Frontier[Any]) -> Group:
    """The table, the smallest first, and the verdict under it."""
    first = found.points[0]
    names = " / ".join(Path(text.source).name for text in first.texts)
    figures = [name for name in first.texts[0].figures if name != "perplexity"]
    title = f"{found.target} at equal bytes; {' and '.join(figures)} on {names}"
    rates = [name for name in first.rates if any(point.rates[name] for point in found.points)]
    if rates:
        title += f"; {' and '.join(rates)} in {first.unit}"
    table = Table(title=title)
    memory = ["memory, MB"] if any(point.peak_rss_bytes for point in found.points) else []
    for column in ("model", "precision", "MB", *figures, *rates, *memory, "best"):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for point in sorted(found.points, key=lambda p: p.num_bytes):
        table.add_row(
            point.model,
            point.precision,
            f"{point.num_bytes / 1e6:,.2f}",
            *(" / ".join(_shown(text.figures[name]) for text in point.texts) for name in figures),
            *(f"{median(point.rates[name]):,.0f}" for name in rates),
            *(f"{(point.peak_rss_bytes or 0) / 1e6:,.0f}" for _ in memory),
            "*" if point in found.best else "",
        )
    lines = [*verdict(found), *found.notes, *(f"left out: {why}" for why in found.skipped)]
    return Group(table, *(Text(line) for line in lines))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _columns(found: Frontier[Any]) -> list[str]:
    first = found.points[0]
    quality = [
        f"{figure}, {Path(text.source).name}" for text in first.texts for figure in text.figures
    ]
    rates = [f"{name}, {first.unit}" for name in first.rates]
    return ["model", "precision", "MB", *quality, *rates, "peak memory, MB", "nothing beats it"]


def _rows(found: Frontier[Any]) -> Iterator[tuple[Any, ...]]:
    for point in sorted(found.points, key=lambda p: p.num_bytes):
        quality = [
            None if value is None else significant(value)
            for text in point.texts
            for value in text.figures.values()
        ]
        yield (
            point.model,
            point.precision,
            significant(point.num_bytes / 1e6),
            *quality,
            *(significant(median(rate)) if rate else None for rate in point.rates.values()),
            significant(point.peak_rss_bytes / 1e6) if point.peak_rss_bytes else None,
            "yes" if point in found.best else "no",
        )


def plot(found: Frontier[Any]) -> Plot:
    """Distance from the original against bytes; the line joins what nothing beats."""
    return Plot(
        name="frontier",
        title="At equal bytes",
        alt=f"{found.points[0].texts[0].drawn} against bytes: "
        + "; ".join(map(_told, _drawn(found))),
        columns=tuple(_columns(found)),
        rows=tuple(_rows(found)),
        draw=lambda canvas: _draw(canvas, found),
        height=3.6,
    )


def _drawn(found: Frontier[Any]) -> list[Artifact]:
    """Rivals have no divergence."""
    return [point for point in found.points if not point.rival]


def _draw(canvas: Canvas, found: Frontier[Any]) -> None:
    points = _drawn(found)
    models = list(dict.fromkeys(point.model for point in points))
    colour_of = {ORIGINAL: BASELINE, **dict(zip(models[1:], colours(), strict=False))}
    text = found.points[0].texts[0]
    with axes(canvas, x="artifact, MB", y=f"{text.drawn}, {Path(text.source).name}") as panel:
        for number, model in enumerate(models):
            mine = [point for point in points if point.model == model]
            panel.scatter(
                *_places(mine),
                marker=MARKERS[number % len(MARKERS)],
                color=colour_of[model],
                label=model,
                zorder=3,
            )
        best = sorted(found.best, key=lambda p: p.num_bytes)
        panel.plot(*_places(best), color=MUTED, linestyle=":", linewidth=1.2, zorder=2)
        for point in points:
            at = [numbers[0] for numbers in _places([point])]
            panel.annotate(
                point.precision, at, xytext=(4, 4), textcoords="offset points", fontsize=7
            )
        log_scale(panel.xaxis)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.margins(0.12)


def _places(points: Sequence[Artifact]) -> tuple[list[float], list[float]]:
    return [p.num_bytes / 1e6 for p in points], [max(_first(p), FLOOR) for p in points]


def write_frontier(found: Frontier[Any], out: Path) -> list[Path]:
    """frontier.json, .png and .csv."""
    shown = plot(found)
    write_json(out / REPORT, frontier_as_dict(found))
    (out / "frontier.png").write_bytes(shown.png)
    write_text(out / "frontier.csv", shown.csv)
    return [out / f"frontier.{kind}" for kind in ("json", "png", "csv")]
