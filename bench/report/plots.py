"""One plot: drawn by matplotlib, shown as SVG in the page's colours, kept as PNG, SVG and CSV.

Inside the page, an SVG takes its colours from CSS variables, so it is legible in light and dark;
text stays text. Everything that a plot shows is in its table, too.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

# Names are CSS variables of the page; these are their values on light paper, and in files.
INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#d9dee3", "#fefefe"
CANDIDATE, BASELINE = "#0a5fc2", "#b4530a"
SERIES = (CANDIDATE, "#0f7b53", "#8b3fb8", "#b3244f", "#5c6b00", "#00707f")
COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "paper": PAPER,
    "baseline": BASELINE,
    **{f"series-{number}": colour for number, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dotexport",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
}
WIDTH, HEIGHT = 4.2, 2.9  # inches: at this width 9 pt stay legible on a phone of 360 px
DPI = 160

Draw = Callable[[Canvas], None]
Cell = str | int | float | None


@dataclass(frozen=True)
class Plot:
    """A plot and the table of what it shows.

    Attributes:
        name: of its files, and its id in the page.
        alt: what a reader who cannot see it should know.
        note: what a reader who can see it should know.
        draw: puts it onto an empty canvas.
    """

    name: str
    title: str
    alt: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    draw: Draw
    note: str = ""
    height: float = HEIGHT

    @cached_property
    def png(self) -> bytes:
        return self._saved("png", dpi=DPI)

    @cached_property
    def svg(self) -> bytes:
        """A file of its own, in light colours."""
        return self._saved("svg", metadata={"Date": None, "Creator": None})

    @property
    def inline(self) -> str:
        """The SVG for inside a page: no prolog, no foreign names, the page's colours, own ids."""
        text = self.svg.decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
        text = re.sub(r"font-family: [^;\"]*;?", "", text)
        text = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", text)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        for reference in ("url(#", 'href="#'):
            text = text.replace(reference, f"{reference}{self.name}-")
        for variable, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{variable})")
        return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)

    @property
    def csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return stream.getvalue()

    @property
    def png_link(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def csv_link(self) -> str:
        return f"data:text/csv;charset=utf-8,{quote(self.csv)}"

    def _saved(self, kind: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        with styled(), warnings.catch_warnings():
            # A name in letters that its font lacks: in the page the reader's own fonts serve.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            canvas = Canvas(figsize=(WIDTH, self.height))
            self.draw(canvas)
            canvas.savefig(stream, format=kind, **options)
        return stream.getvalue()


def styled() -> AbstractContextManager[None]:
    """Our style alone, whatever matplotlibrc the user has."""
    style: Any = dict(mpl.rcParamsDefault)
    style.update(STYLE)
    return mpl.rc_context(style)


@contextmanager
def axes(canvas: Canvas, *, x: str, y: str, legend: bool = True) -> Iterator[Any]:
    """Empty axes with labels; a legend above them when the block is done."""
    panel = canvas.subplots()
    yield panel
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    handles, labels = panel.get_legend_handles_labels()
    if legend and handles:
        columns = 1 if max(map(len, labels)) > 26 else 2
        labels = [brief(label, 56, lines=1) for label in labels]
        canvas.legend(handles, labels, loc="outside upper left", ncols=columns)


def log_scale(axis: Any) -> None:
    """Decades, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(
    canvas: Canvas,
    labels: Sequence[str],
    groups: dict[str, Sequence[float | None]],
    *,
    x: str,
    form: str = ",.1f",
) -> None:
    """Horizontal bars, the first label on top, each with its number."""
    with axes(canvas, x=x, y="") as panel:
        colours = {"original": BASELINE, "narrowed": CANDIDATE}
        thick = 0.8 / len(groups)
        longest = max((v for values in groups.values() for v in values if v), default=1.0)
        for row, (name, values) in enumerate(groups.items()):
            heights = [n + (row - (len(groups) - 1) / 2) * thick for n in range(len(labels))]
            known = [(h, v) for h, v in zip(heights, values, strict=True) if v is not None]
            at, lengths = zip(*known, strict=True) if known else ((), ())
            hatch = "////" if name == "original" else None
            panel.barh(
                at,
                lengths,
                thick * 0.92,
                label=name,
                color=colours[name],
                hatch=hatch,
                edgecolor=PAPER,
                linewidth=0,
            )
            for height, value in known:
                panel.text(
                    value + longest * 0.015, height, format(value, form), va="center", fontsize=8
                )
        panel.set_xlim(0, longest * 1.17)
        panel.set_yticks(range(len(labels)), [brief(label) for label in labels])
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")


def brief(label: str, width: int = 26, lines: int = 2) -> str:
    """A label that leaves room for its plot; the table has it whole."""
    return "\n".join(textwrap.wrap(label, width, max_lines=lines, placeholder="…"))


def bars_height(rows: int) -> float:
    """Inches for so many labels."""
    return 1.05 + 0.5 * rows


def colours() -> Iterator[str]:
    while True:
        yield from SERIES


def significant(value: float | None) -> float | None:
    """Four significant digits: what a reader compares, not what a float holds."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
