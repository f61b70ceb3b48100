"""A measured table of docs/results/: Markdown and JSON, with the machine and versions it is of."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport.models.text_options import TextOptions
from dotexport.storage import manifest
from dotexport.storage.files import write_json, write_text

Table = list[dict[str, Any]]
RESULTS = Path("docs/results")
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")]
Calib = Annotated[str, typer.Option(help="Calibration text.")]
Test = Annotated[str, typer.Option(help="Text of its domain.")]
Other = Annotated[str, typer.Option(help="Text of another domain.")]
Params = Annotated[list[str] | None, typer.Option(help="Budget; repeat it.")]
Only = Annotated[list[str] | None, typer.Option(help="A way; repeat it.")]

CALIBRATION = TextOptions(source="embedded:calibration", samples=128, seqlen=512)
EVALUATION = TextOptions(source="embedded:evaluation", samples=128, seqlen=512)


def stories() -> tuple[Path, str]:
    if "DOTEXPORT_ASSETS" not in os.environ:
        raise SystemExit("set DOTEXPORT_ASSETS to the folder of stories260k and tinystories")
    assets = Path(os.environ["DOTEXPORT_ASSETS"]).resolve()
    return assets / "stories260k", str(assets / "tinystories" / "train-2MiB.txt")


def options_but(context: typer.Context, *names: str) -> dict[str, str]:
    """What a command was asked for, without these and where its tables go."""
    asked = context.params
    return {name: str(value) for name, value in asked.items() if name not in {"out", *names}}


def save(file: Path, title: str, protocol: str, rows: Table, *, command: str = "") -> None:
    """FILE.md and FILE.json: the table, how it was taken, and on what."""
    machine = manifest.environment()
    command = command or f"python -m dotexport.bench {shlex.join(sys.argv[1:])}"
    libraries = ", ".join(f"{name} {v}" for name, v in machine["libraries"].items())
    text = f"# {title}\n\n{protocol}\n\n    {command}\n\n{_markdown(rows)}\n"
    text += f"Machine: {machine['cpu']}, {machine['cores']['usable']} cores, "
    text += f"{machine['platform']}, Python {machine['python']}; {libraries}.\n"
    write_text(file.with_suffix(".md"), text)
    write_json(
        file.with_suffix(".json"),
        {"title": title, "command": command, "rows": rows, "environment": machine},
    )
    typer.echo(text)


def _markdown(rows: Table) -> str:
    """One table per kind of row: rows with the same columns stand together."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        columns = tuple(row)
        if columns not in parts:
            rule = "|".join("---" for _ in columns)
            parts[columns] = [f"| {' | '.join(columns)} |", f"|{rule}|"]
        parts[columns].append(f"| {' | '.join(_cell(value) for value in row.values())} |")
    return "\n\n".join("\n".join(lines) for lines in parts.values()) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
