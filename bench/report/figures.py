"""The plots of a report: which figures of which outputs, against what.

Each function gives the plots that the outputs have figures for, and none where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from ..statistics import Comparison
from .collected import Bench, Output, bytes_of, several, slug
from .plots import (
    BASELINE,
    CANDIDATE,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    Cell,
    Plot,
    axes,
    bars,
    bars_height,
    brief,
    log_scale,
    significant,
)

SITES = {
    "input_layernorm": "reading: attention",
    "self_attn.o_proj": "writing: attention",
    "post_attention_layernorm": "reading: MLP",
    "mlp.down_proj": "writing: MLP",
}
MEASURED = {"ttft": "prefill", "tpot": "decode", "e2el": "end to end"}
LATENCIES = {"ttft": "Time to first token", "itl": "Inter-token latency"}
DRAWN = 200  # points of a distribution: more is not seen
SPREAD = 20  # slowest over fastest, from which on times are drawn on a log axis
SHARES = (0, 0.25, 0.5, 0.75, 0.9, 0.99)
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def sizes(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Bytes of every artifact, original and narrowed."""
    rows: list[tuple[Cell, ...]] = []
    for output in outputs:
        before = {bench.artifact: bench.result.baseline.artifact_bytes for bench in output.benches}
        for name, artifact in output.record.get("artifacts", {}).items():
            runtime = f"{artifact['target']} {artifact['precision']}"
            label, original = _sizes_of(output, name, runtime, before)
            label = f"{output.name}: {label}" if several(outputs) else label
            rows.append((label, _mb(original), _mb(bytes_of(name, artifact))))
    if not rows:
        return
    labels = [str(row[0]) for row in rows]
    groups: dict[str, Any] = {"original": [r[1] for r in rows], "narrowed": [r[2] for r in rows]}
    columns = ["artifact", "original, MB", "narrowed, MB"]
    told = rows
    if all(row[1] is None for row in rows):  # no half of which nothing is known
        del groups["original"], columns[1]
        told = [(row[0], row[2]) for row in rows]
    said = "; ".join(
        f"{label} {_pair(*row[1:])} MB" for label, row in zip(labels, rows, strict=True)
    )
    yield Plot(
        name="sizes",
        title="Size of every artifact",
        alt=f"Bars of bytes before and after: {said}.",
        columns=tuple(columns),
        rows=tuple(told),
        draw=lambda canvas: bars(canvas, labels, groups, x="megabytes (10⁶ bytes)"),
        note="hf counts weight files alone. Originals of other artifacts are known where a bench "
        "exported them.",
        height=bars_height(len(rows)),
    )


def footprint(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Bytes on disk and in memory."""
    yield from sizes(outputs)
    yield from memory(outputs)


def speeds(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Speed over the original, and rates by batch."""
    yield from speed(outputs)
    yield from batches(outputs)


def speed(outputs: Sequence[Output]) -> Iterator[Plot]:
    """How many times as fast, with intervals."""
    rows: list[tuple[str, Comparison]] = [
        (f"{_named(bench, outputs)}: {MEASURED[metric]}", bench.result.comparisons[metric])
        for output in outputs
        for bench in _single(output)
        for metric in MEASURED
    ]
    if not rows:
        return
    said = "; ".join(f"{label} {found.verdict}" for label, found in rows)
    yield Plot(
        name="speed",
        title="Speed over the original",
        alt=f"Speed of the narrowed model over the original with 95 % intervals: {said}.",
        columns=("what", "times as fast", "low", "high", "verdict"),
        rows=tuple(
            (label, _r(1 / f.ratio), _r(1 / f.high), _r(1 / f.low), f.verdict) for label, f in rows
        ),
        draw=lambda canvas: _forest(canvas, rows),
        note="Dots are ratios of medians, bars their 95 % intervals; left of the line is slower. "
        "An interval that holds 1 is no measurable gain.",
        height=0.85 + 0.32 * len(rows),
    )


def latency(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Distribution of each latency, one plot for each bench that is no point of a sweep."""
    for output in outputs:
        for bench in _single(output):
            for metric, title in LATENCIES.items():
                yield _distribution(bench, metric, f"{title}, {_named(bench, outputs)}")


def batches(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Decode and prefill rates by batch size, where more than one was measured."""
    series: dict[tuple[Any, ...], list[Bench]] = {}
    for output in outputs:
        for bench in output.benches:
            asked = bench.result.workload
            name = f"{output.name}: {bench.runtime}" if several(outputs) else bench.runtime
            shape = (asked.prompt_length, asked.generation_length)
            key = (name, *shape, asked.threads, asked.concurrency)
            series.setdefault(key, []).append(bench)
    for (name, prompt, generated, *_), benches in series.items():
        by_batch = {b.result.workload.batch_size: b for b in benches}
        if len(by_batch) < 2:
            continue
        for rate, title in {"decode_tok_s": "Decode", "prefill_tok_s": "Prefill"}.items():
            yield _by_batch(f"{title} rate by batch, {name}", rate, by_batch, (prompt, generated))


def memory(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Peak memory of each measuring process."""
    rows: list[tuple[Cell, ...]] = []
    for output in outputs:
        for bench in _single(output):
            sides = (bench.result.baseline, bench.result.candidate)
            peaks = [side.peak_rss_bytes / 1e6 for side in sides]
            own = [(side.peak_rss_bytes - side.rss_before_load_bytes) / 1e6 for side in sides]
            rows.append((_named(bench, outputs), *(round(v, 1) for v in (*peaks, *own))))
    if not rows:
        return
    labels = [str(row[0]) for row in rows]
    groups: dict[str, Any] = {"original": [r[1] for r in rows], "narrowed": [r[2] for r in rows]}
    said = "; ".join(f"{row[0]} {_pair(*row[1:3])} MB" for row in rows)
    yield Plot(
        name="memory",
        title="Peak resident memory",
        alt=f"Bars of the most memory each process held: {said}.",
        columns=(
            "bench",
            "original, MB",
            "narrowed, MB",
            "original without interpreter, MB",
            "narrowed without interpreter, MB",
        ),
        rows=tuple(rows),
        draw=lambda canvas: bars(canvas, labels, groups, x="megabytes (10⁶ bytes)", form=",.0f"),
        note="All that the process held: interpreter and harness, runtime, weights, cache, logits.",
        height=bars_height(len(rows)),
    )


def layers(outputs: Sequence[Output]) -> Iterator[Plot]:
    """Held-out reconstruction error of every sublayer."""
    for output in outputs:
        sites = [site for site in output.shrink.get("sites", []) if site.get("error") is not None]
        if not sites:
            continue
        name = f", {output.name}" if several(outputs) else ""
        worst = max(sites, key=lambda site: float(site["error"]))
        where = f"layer {worst['layer']} {worst['site']}"
        yield Plot(
            name=slug(f"layers {output.name if several(outputs) else ''}"),
            title=f"Reconstruction error by layer{name}",
            alt=f"Error of {len(sites)} sublayers on held-out text; the largest, "
            f"{worst['error']:.3g}, is at {where}.",
            columns=("layer", "site", "before the refit", "after"),
            rows=tuple(
                (
                    s["layer"] if s["layer"] is not None else "end",
                    s["site"],
                    significant(s.get("analytic_error")),
                    significant(s["error"]),
                )
                for s in sites
            ),
            draw=lambda canvas, sites=sites: _layers(canvas, sites),  # type: ignore[misc]
            note="Squared error over the energy of what should be computed, on held-out windows: "
            "0 is exact, 1 is as good as nothing.",
        )


# How each is drawn -------------------------------------------------------------------------------


def _forest(canvas: Canvas, rows: list[tuple[str, Comparison]]) -> None:
    with axes(canvas, x="times as fast as the original", y="") as panel:
        for number, (_, found) in enumerate(rows):
            middle, low, high = 1 / found.ratio, 1 / found.high, 1 / found.low
            colour = CANDIDATE if low > 1 else BASELINE if high < 1 else MUTED
            panel.plot([low, high], [number, number], color=colour, linewidth=3, alpha=0.55)
            panel.plot(middle, number, "o", color=colour, markersize=6)
        panel.axvline(1, color=INK, linewidth=1, linestyle="--")
        panel.set_yticks(range(len(rows)), [brief(label) for label, _ in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.grid(visible=False, axis="y")


def _distribution(bench: Bench, metric: str, title: str) -> Plot:
    sides = {"original": bench.result.baseline, "narrowed": bench.result.candidate}
    values = {name: np.sort(side.values(metric)) for name, side in sides.items()}
    edge = max(float(np.quantile(found, 0.99)) for found in values.values()) * 1.08
    beyond = sum(int((found > edge).sum()) for found in values.values())
    medians = {name: float(np.median(found)) for name, found in values.items()}
    note = f"{len(values['original']):,} and {len(values['narrowed']):,} values."
    if beyond:
        longest = max(float(found[-1]) for found in values.values())
        note += f" {beyond} beyond the right edge, the longest {longest:.1f} ms."
    return Plot(
        name=f"{bench.slug}-{metric}",
        title=title,
        alt=f"Distribution of {metric.upper()}: the median is {medians['original']:.3g} ms for the "
        f"original and {medians['narrowed']:.3g} ms for the narrowed model.",
        columns=("percentile", "original, ms", "narrowed, ms"),
        rows=tuple(
            (
                q,
                *(
                    significant(float(np.percentile(values[name], q)))
                    for name in ("original", "narrowed")
                ),
            )
            for q in QUANTILES
        ),
        draw=lambda canvas: _ecdf(canvas, values, edge),
        note=note,
    )


def _ecdf(canvas: Canvas, values: dict[str, Any], edge: float) -> None:
    with axes(canvas, x="milliseconds", y="share of values below") as panel:
        for name, found in values.items():
            shares = np.linspace(0, 1, min(len(found), DRAWN))
            style, colour = ("--", BASELINE) if name == "original" else ("-", CANDIDATE)
            panel.plot(np.quantile(found, shares), shares, style, color=colour, label=name)
            marks = [0.5, 0.9, 0.99]
            panel.plot(np.quantile(found, marks), marks, "o", color=colour, markersize=4)
        least = min(float(found[0]) for found in values.values()) * 0.95
        if least > 0 and edge > SPREAD * least:  # else the few slow ones squeeze all others
            log_scale(panel.xaxis)
        panel.set_xlim(least, edge)
        panel.set_ylim(0, 1.02)
        panel.set_yticks(SHARES, [f"{100 * share:g} %" for share in SHARES])


def _by_batch(title: str, rate: str, by_batch: dict[int, Bench], lengths: tuple[int, int]) -> Plot:
    batches = sorted(by_batch)
    rates = {
        name: [
            getattr(by_batch[batch].result, side).throughput(by_batch[batch].result.workload)[rate]
            for batch in batches
        ]
        for name, side in (("original", "baseline"), ("narrowed", "candidate"))
    }

    def draw(canvas: Canvas) -> None:
        with axes(canvas, x="sequences at once", y="tokens/s") as panel:
            for name, found in rates.items():
                style, colour = ("--s", BASELINE) if name == "original" else ("-o", CANDIDATE)
                panel.plot(batches, found, style, color=colour, label=name, markersize=5)
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(batch) for batch in batches])
            panel.minorticks_off()
            panel.set_ylim(0, None)

    first, last = batches[0], batches[-1]
    return Plot(
        name=slug(title),
        title=title,
        alt=f"From batch {first} to {last} the original goes from {rates['original'][0]:,.0f} to "
        f"{rates['original'][-1]:,.0f} tokens/s, the narrowed model from "
        f"{rates['narrowed'][0]:,.0f} to {rates['narrowed'][-1]:,.0f}.",
        columns=("batch", "original, tokens/s", "narrowed, tokens/s"),
        rows=tuple(
            (batch, round(before, 1), round(after, 1))
            for batch, before, after in zip(batches, *rates.values(), strict=True)
        ),
        draw=draw,
        note=f"Prompts of {lengths[0]} tokens, {lengths[1]} generated.",
    )


def _layers(canvas: Canvas, sites: list[dict[str, Any]]) -> None:
    with axes(canvas, x="layer", y="relative squared error") as panel:
        names = list(dict.fromkeys(site["site"] for site in sites if site["layer"] is not None))
        styles = ("-", "--", "-.", ":")
        for number, name in enumerate(names):
            mine = [s for s in sites if s["site"] == name and s["error"] > 0]
            style = styles[number % len(styles)]
            panel.plot(
                [s["layer"] for s in mine],
                [s["error"] for s in mine],
                style,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4.5,
                linewidth=1.4,
                color=SERIES[number % len(SERIES)],
                label=SITES.get(name, name),
            )
        if any(s["error"] > 0 for s in sites):
            log_scale(panel.yaxis)
        panel.xaxis.get_major_locator().set_params(integer=True)


# What is drawn -----------------------------------------------------------------------------------


def _single(output: Output) -> list[Bench]:
    """Benches that are no points of a sweep; the sweep if there is nothing else."""
    return [bench for bench in output.benches if not bench.swept] or list(output.benches)


def _sizes_of(
    output: Output, name: str, runtime: str, before: dict[str, int]
) -> tuple[str, int | None]:
    if name == "hf":
        source = output.record.get("source") or {}
        return "hf", source.get("bytes")
    return runtime, before.get(runtime)


def _named(bench: Bench, outputs: Sequence[Output]) -> str:
    return f"{bench.output}: {bench.label}" if several(outputs) else bench.label


def _mb(size: int | None) -> float | None:
    return None if size is None else round(size / 1e6, 2)


def _pair(before: Cell, after: Cell) -> str:
    return f"{'unknown' if before is None else before} to {after}"


def _r(value: float) -> float:
    return round(value, 3)
