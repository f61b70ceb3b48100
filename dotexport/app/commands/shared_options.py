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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Seed = Annotated[int, typer.Option(help="Same seed, same bytes.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Groups = Annotated[int, typer.Option(min=2, help="A B B A turns; 8 and more give a verdict.")]
Seconds = Annotated[float, typer.Option(min=0, help="Seconds for each model, at least.")]
