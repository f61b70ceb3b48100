"""The verbs that run a whole chain: demo, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dotexport.app.commands.shared_options import Device, Json, Out, Overwrite
from dotexport.app.progress import progress
from dotexport.app.terminal import show_json, show_summary


def demo(
    out: Out = Path("dotexport-demo"),
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe to edit, and stop.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shrink, export, verify, evaluate and bench the model that ships inside; no network."""
    file = Path(__file__).parents[1] / "demo.yaml"
    if print_recipe:
        typer.echo(file.read_text(encoding="utf-8"), nl=False)
        return
    _run(file, out, overwrite, "auto", as_json)


def run(
    recipe: Annotated[Path, typer.Argument(help="recipe.yaml; see dotexport demo --print-recipe.")],
    out: Out,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a recipe: the whole chain. Run it again after an interruption and it goes on."""
    _run(recipe, out, overwrite, device, as_json)


def _run(file: Path, out: Path, overwrite: bool, device: str, as_json: bool) -> None:
    from dotexport.app.pipeline import run as chain
    from dotexport.app.recipe import Recipe

    with progress() as report:
        record = chain(Recipe.load(file), out, overwrite=overwrite, device=device, progress=report)
    if as_json:
        show_json(record)
        return
    show_summary(out, "done")
