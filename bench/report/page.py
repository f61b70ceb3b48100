"""The page: outputs in, one file of HTML out that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dotexport.storage.files import write_text
from dotexport.version import __version__

from . import figures, tradeoff, words
from .collected import Output, collect
from .plots import COLOURS, Plot

REPORT = Path("reports/report.html")


def write_report(
    outputs: Sequence[Path], out: Path | None = None, *, figures: bool = False
) -> Path:
    """Write the report of one output, or of several side by side.

    Args:
        outputs: output folders of dotexport.
        out: the file; None: reports/report.html in the first output.
        figures: also write PNG, SVG and CSV of every plot into a folder `figures` beside it.

    Raises:
        CheckpointError: a folder that is no output, or a damaged report in it.
        UsageError: the same output twice.
    """
    found = collect(outputs)
    file = out or outputs[0] / REPORT
    plots = draw(found)
    write_text(file, render(found, plots))
    if figures:
        write_figures(file.parent / "figures", [plot for _, part in plots for plot in part])
    return file


def draw(outputs: Sequence[Output]) -> list[tuple[str, list[Plot]]]:
    """All plots by heading; headings without plots are left out."""
    parts = {
        "Quality against size and speed": tradeoff.quality,
        "Speed": figures.speeds,
        "Latency": figures.latency,
        "Size and memory": figures.footprint,
        "Where the error is": figures.layers,
    }
    drawn = [(title, list(plots_of(outputs))) for title, plots_of in parts.items()]
    return [(title, plots) for title, plots in drawn if plots]


def render(outputs: Sequence[Output], plots: Sequence[tuple[str, Sequence[Plot]]]) -> str:
    """HTML of the report."""
    names = ", ".join(dict.fromkeys(output.model for output in outputs))
    return page(
        "report.html.j2",
        title=f"{names}, narrowed",
        outputs=outputs,
        parts=plots,
        words=words,
        several=len(outputs) > 1,
    )


def page(template: str, **content: Any) -> str:
    """A template of this package with the style and macros of all pages; everything escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dotexport.bench.report", ""),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(
        **content, colours=COLOURS, version=__version__, written=written
    )


def write_figures(folder: Path, plots: Iterable[Plot]) -> None:
    """PNG, SVG and CSV of every plot."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
        (folder / f"{plot.name}.svg").write_bytes(plot.svg)
        write_text(folder / f"{plot.name}.csv", plot.csv)
