"""The table of docs/results/rounding.md: weights rounded for a text, beside weights to the nearest
level, in as many bytes.

    python -m dotexport.bench rounding --model FOLDER --calib FILE --test FILE --other FILE

Each artifact runs in its own runtime and is held against its own model in float32, so that nothing
but rounding is in the figures.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dotexport.app.pipeline import source_folder
from dotexport.app.progress import progress
from dotexport.app.rounding_text import text_of
from dotexport.exports.rounding_options import RoundingOptions
from dotexport.models.text_options import TextOptions

from ..frontier import frontier
from ..frontier_points import Point
from .result_files import RESULTS, Out, Table, save

OF_GGUF = ("int8", "int4", "int6-k", "int4-k", "int3-k", "int2-k")
INTEGERS = ("ort-cpu:int4", *(f"gguf:{precision}" for precision in OF_GGUF))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder of a model, or `embedded`.")],
    calib: Annotated[str, typer.Option(help="Text that weights are rounded for.")],
    test: Annotated[str, typer.Option(help="Text that is judged on.")],
    other: Annotated[str, typer.Option(help="A second one, of another kind.")],
    target: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    calib_samples: Annotated[int, typer.Option(help="Windows of --calib.")] = 64,
    samples: Annotated[int, typer.Option(help="Windows of each judged text.")] = 12,
    seqlen: Annotated[int, typer.Option(help="Tokens in each of these.")] = 1024,
    name: Annotated[str, typer.Option(help="File of the table.")] = "rounding",
    called: Annotated[str, typer.Option(help="What the table calls the model.")] = "the model",
    out: Out = RESULTS,
) -> None:
    """Divergence and perplexity of integers, rounded to nearest and for a text."""
    folder, rows = source_folder(model), Table()
    texts = [TextOptions(source=t, samples=samples, seqlen=seqlen) for t in (test, other)]
    read = text_of(RoundingOptions(calib=calib, samples=calib_samples))
    with progress() as report:
        for spec in target or INTEGERS:
            asked = [spec], texts
            nearest, chosen = (
                frontier(folder, [], *asked, rounded_for=r, progress=report).points[0]
                for r in (None, read)
            )
            rows.append(_row(spec, nearest, chosen))
    save(
        out / name,
        f"Weights rounded for a text: {called}",
        f"Rounded to nearest / for up to {calib_samples} windows of 512 tokens of `{calib}`. KL is "
        f"to the same model in float32, in nats per token, on up to {samples} windows of {seqlen} "
        f"tokens of `{test}` and of `{other}`.",
        rows,
    )


def _row(spec: str, nearest: Point, chosen: Point) -> dict[str, str]:
    if nearest.num_bytes != chosen.num_bytes:
        raise SystemExit(f"{spec}: {nearest.num_bytes} and {chosen.num_bytes} bytes")
    row = {"target": spec, "bytes": f"{nearest.num_bytes:,}"}
    for what, one, two in zip(("", "other "), nearest.texts, chosen.texts, strict=True):
        row[f"{what}KL"] = f"{one.kl:.2g} / {two.kl:.2g}"
        row[f"{what}perplexity"] = f"{one.perplexity:.4g} / {two.perplexity:.4g}"
    return row


if __name__ == "__main__":
    app()
