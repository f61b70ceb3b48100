"""Plots of what size and speed cost in quality: every model as every runtime holds it, the original
among them, and which of them nothing else beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure as Canvas

from ..result import Measurement
from .collected import Bench, Output, bytes_of, several
from .plots import BASELINE, MARKERS, MUTED, Plot, axes, colours, significant


class Point(NamedTuple):
    """A model as one runtime holds it."""

    model: str
    runtime: str
    x: float
    perplexity: float


def quality(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Perplexity against size and against decode speed, the original among them."""
    yield from _tradeoff(
        "quality-size", "Quality against size", "artifact, MB", _by_size(outputs), smaller=True
    )
    yield from _tradeoff(
        "quality-speed", "Quality against speed", "decode, tokens/s", _by_speed(outputs)
    )


def _tradeoff(
    name: str, title: str, x: str, points: list[Point], *, smaller: bool = False
) -> Iterator[Plot]:
    if len(points) < 2:
        return
    best = _frontier(points, smaller=smaller)
    said = "; ".join(f"{p.model}, {p.runtime}: {p.x:,.4g}, {p.perplexity:.3f}" for p in points)
    yield Plot(
        name=name,
        title=title,
        alt=f"Perplexity against {x}: {said}.",
        columns=("model", "runtime", x, "perplexity", "nothing better in both"),
        rows=tuple(
            (
                p.model,
                p.runtime,
                significant(p.x),
                significant(p.perplexity),
                "yes" if p in best else "no",
            )
            for p in points
        ),
        draw=lambda canvas: _scatter(canvas, points, best, x),
        note="Lower is better, and so is further "
        + ("left" if smaller else "right")
        + ". The dotted line joins what nothing else beats in both. Perplexity is that of the "
        "float32 weights; what rounding adds stands under parity.",
        height=3.3,
    )


def _scatter(canvas: Canvas, points: list[Point], best: list[Point], x: str) -> None:
    with axes(canvas, x=x, y="perplexity, held-out text") as panel:
        models = list(dict.fromkeys(point.model for point in points))
        runtimes = list(dict.fromkeys(point.runtime for point in points))
        colour_of = dict(zip([m for m in models if m != "original"], colours(), strict=False))
        for point in points:
            colour = colour_of.get(point.model, BASELINE)
            marker = MARKERS[runtimes.index(point.runtime) % len(MARKERS)]
            hollow = {"facecolor": "none"} if point.model == "original" else {"facecolor": colour}
            panel.scatter(
                point.x,
                point.perplexity,
                s=52,
                marker=marker,
                edgecolor=colour,
                linewidth=1.8,
                label=f"{point.model}, {point.runtime}",
                zorder=3,
                **hollow,
            )
        line = sorted(best, key=lambda p: p.x)
        panel.plot(
            [p.x for p in line],
            [p.perplexity for p in line],
            color=MUTED,
            linestyle=":",
            linewidth=1.2,
            zorder=2,
        )
        panel.margins(0.12)


def _by_size(outputs: Sequence[Output]) -> list[Point]:
    points: list[Point] = []
    for output in outputs:
        if not output.quality:
            continue
        before, after = output.quality["baseline_perplexity"], output.quality["perplexity"]
        if source := output.record.get("source"):
            points.append(Point("original", "hf", source["bytes"] / 1e6, before))
        if stock := output.record.get("artifacts", {}).get("hf"):
            points.append(Point(_name(output, outputs), "hf", bytes_of("hf", stock) / 1e6, after))
        for model, bench, side, perplexity in _measured(output, outputs):
            points.append(Point(model, bench.artifact, side.artifact_bytes / 1e6, perplexity))
    return list(dict.fromkeys(points))


def _by_speed(outputs: Sequence[Output]) -> list[Point]:
    return [
        Point(
            model,
            bench.runtime,
            side.throughput(bench.result.workload)["decode_tok_s"],
            perplexity,
        )
        for output in outputs
        if output.quality
        for model, bench, side, perplexity in _measured(output, outputs)
    ]


def _measured(
    output: Output, outputs: Sequence[Output]
) -> Iterator[tuple[str, Bench, Measurement, float]]:
    """Both models of every runtime, and their perplexity."""
    quality = output.quality
    for bench in _once(output):
        yield "original", bench, bench.result.baseline, quality["baseline_perplexity"]
        yield _name(output, outputs), bench, bench.result.candidate, quality["perplexity"]


def _name(output: Output, outputs: Sequence[Output]) -> str:
    return output.name if several(outputs) else "narrowed"


def _once(output: Output) -> list[Bench]:
    """One bench for each runtime: that of the smallest batch."""
    chosen: dict[str, Bench] = {}
    for bench in sorted(output.benches, key=lambda b: b.result.workload.batch_size):
        chosen.setdefault(bench.runtime, bench)
    return list(chosen.values())


def _frontier(points: Sequence[Point], *, smaller: bool) -> list[Point]:
    """Points that no other one equals or beats in both, and beats in one."""
    sign = 1 if smaller else -1

    def beaten(point: Point) -> bool:
        return any(
            sign * other.x <= sign * point.x
            and other.perplexity <= point.perplexity
            and (other.x, other.perplexity) != (point.x, point.perplexity)
            for other in points
        )

    return [point for point in points if not beaten(point)]
