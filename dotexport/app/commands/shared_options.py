"""Options that several verbs share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Model folder (config.json, *.safetensors), GGUF file, or hub id.")
]
Output = Annotated[Path, typer.Argument(help="Output of dotexport shrink, export or run.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; must be new or empty.")]
Home = Annotated[
    Path | None, typer.Option("--out", "-o", help="For a model that is no output: where to.")
]
Kept = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder for artifacts, table and plot; run again, it goes on."
    ),
]
Held = Annotated[bool, typer.Option(help="Hold each artifact against torch.")]
Only = Annotated[list[str] | None, typer.Option(help="Only these; default: all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
