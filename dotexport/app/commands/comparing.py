"""The verbs that judge and show what was measured: compare, history, report. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dotexport.app.commands.shared_options import Json
from dotexport.app.door import benches
from dotexport.app.terminal import show_json, stderr
from dotexport.errors import UsageError

Gate = Annotated[
    Path | None,
    typer.Option(help='YAML file of limits, e.g. decode_tok_s: ">=1.15x"; see docs/compare.md.'),
]


def compare(
    report: Annotated[Path, typer.Argument(help="JSON that dotexport bench wrote.")],
    newer: Annotated[
        Path | None,
        typer.Argument(help="A second one, whose candidate is held against that of the first."),
    ] = None,
    gate: Gate = None,
    rule: Annotated[
        str | None,
        typer.Option(help="doubt-passes, point or strict: for every limit of the gate."),
    ] = None,
    quality: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output, or JSON of dotexport eval, with the quality of the (newer) report; "
            "default: the output that the report lies in."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Compare other devices, runtimes and workloads, too.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Write the verdicts as JUnit XML into this file.")
    ] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Annotations and step summary for GitHub Actions.")
    ] = False,
    history: Annotated[
        Path | None, typer.Option(help="Append the figures to this .jsonl file.")
    ] = None,
    trend: Annotated[
        Path | None,
        typer.Option(help="Then draw the history into this file: .html, .png, .svg or .csv."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a candidate with its baseline, or two reports, and hold limits against it.

    Exit code 4 if a limit is missed; 2 if the reports are of different devices, runtimes or
    workloads.

    Example: dotexport compare last/bench.json OUT/reports/bench-ort-cpu.json --gate gate.yaml
    """
    bench = benches()
    if trend is not None and history is None:
        raise UsageError("--trend draws what --history keeps; give both")
    files = [report, *([newer] if newer else [])]
    found = bench.judge(files, gate=gate, rule=rule, quality=quality or (), force=force)
    Console(stderr=as_json).print(bench.render_verdict(found))
    if junit is not None:
        bench.write_junit(junit, found.lines, found.properties)
    if github:
        # The runner reads both streams, and with --json stdout holds the document alone.
        for line in bench.annotated(found.lines):
            typer.echo(line, err=as_json)
        bench.write_step_summary(found.lines, found.notes)
    if history is not None:
        bench.append_history(history, found.comparisons, found.lines)
        if trend is not None:
            _draw(history, trend, gate, None)
    if as_json:
        show_json(found.as_dict())
    bench.require(found.lines)


def show_history(
    file: Annotated[Path, typer.Argument(help="What dotexport compare --history appended to.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: .html, .png, .svg or .csv.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Figures to draw; default: those of the gate, or the usual ones."),
    ] = None,
    gate: Gate = None,
) -> None:
    """Draw how figures developed; different devices and workloads are drawn apart.

    Example: dotexport history history.jsonl -o trend.html --gate gate.yaml
    """
    _draw(file, out, gate, metric)


def report(
    outputs: Annotated[list[Path], typer.Argument(help="Outputs of dotexport, one or several.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Default: reports/report.html in the first output."),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also PNG, SVG and CSV files of every plot.")
    ] = False,
) -> None:
    """Write one self-contained page: size, quality, speed, parity, and how to reproduce them.

    Example: dotexport report OUT
    """
    written = benches().write_report(outputs, out, figures=figures)
    stderr.print(f"report {written}", soft_wrap=True, highlight=False)


def _draw(file: Path, out: Path, gate: Path | None, metrics: list[str] | None) -> None:
    limits = benches().read_gate(gate) if gate else ()
    benches().write_trend(file, out, limits=limits, metrics=metrics or ())
    stderr.print(f"trend {out}", soft_wrap=True, highlight=False)
