"""The verbs of the command line for text encoders: one function per verb, no logic.

`dotexport shrink FOLDER` and `eval` come here when FOLDER is a BERT, RoBERTa,
XLM-R or DistilBERT, a folder of sentence-transformers, or an output that holds one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dotexport.app.flags import with_options
from dotexport.app.progress import progress
from dotexport.app.terminal import show_figures, show_json
from dotexport.encoders.encoder_options import SentenceOptions, ShrinkOptions

from .shared_options import Json, Out, Overwrite

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of an encoder (config.json, safetensors).")]
Output = Annotated[Path, typer.Argument(help="Output of dotexport for an encoder.")]


@app.callback()
def verbs() -> None:
    """Verbs of their own for text encoders."""


@app.command()
@with_options
def shrink(
    model: Folder,
    out: Out,
    options: ShrinkOptions,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Narrow a text encoder: fewer MLP neurons and layers; OUT/hf is of the same stock class.

    Pooling and what else sentence-transformers keeps is carried over byte by byte. Attention heads
    stay: the stock classes have no place for fewer.

    Example: dotexport shrink ./all-MiniLM-L6-v2 -o out --params 0.8x --calib text.txt
    """
    from dotexport.encoders import encoder_shrinking

    with progress() as report:
        shrunk = encoder_shrinking.shrink(model, out, options, overwrite=overwrite, progress=report)
    if as_json:
        show_json(shrunk.as_dict())
        return
    show(out, f"narrowed in {shrunk.seconds:.0f} s")


@app.command("eval")
@with_options
def evaluate(
    out: Output,
    baseline: Annotated[Path, typer.Option(help="The original encoder.")],
    options: SentenceOptions,
    as_json: Json = False,
) -> None:
    """Embeddings beside the original's: mean cosine, and recall@10 of the original's neighbours.

    Of models with a task head also how often both name the same class, and the divergence of class
    probabilities.

    Example: dotexport eval OUT --baseline ./all-MiniLM-L6-v2 --text held-out.txt
    """
    from dotexport.encoders.encoder_quality import evaluate_into

    record = evaluate_into(out, baseline, options)
    if as_json:
        show_json(record)
        return
    show(out, "quality")


def show(out: Path, title: str) -> None:
    """Original beside narrowed, for whatever figures the manifest holds."""
    from dotexport.encoders import encoder_card
    from dotexport.storage import manifest

    rows = encoder_card.rows(manifest.read(out))
    show_figures(rows, "narrowed", title, f"model {out / 'hf'}")
