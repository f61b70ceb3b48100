"""The verbs of the command line for text encoders: one function per verb, no logic.

`dotexport shrink FOLDER`, `plan`, `export`, `verify`, `eval` and `bench` come here when FOLDER is
one of `encoders.kinds`, a folder of sentence-transformers, or an output that holds one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dotexport.app.flags import with_options
from dotexport.app.progress import progress
from dotexport.app.terminal import show_figures, show_frontier, show_json, show_written, stderr
from dotexport.app.turn_options import RoundOptions, TurnOptions
from dotexport.encoders.encoder_options import SentenceOptions, ShrinkOptions, SizeOptions

from .shared_options import Held, Home, Json, Kept, Only, Out, Overwrite

if TYPE_CHECKING:
    from dotexport.encoders.encoder_verifying import Parity

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
    """Narrow a text encoder: fewer MLP neurons, layers, tokens, and a narrower stream with fewer
    heads; OUT/hf is of the same class.

    What sentence-transformers keeps is carried over byte by byte, and with --hidden a linear layer
    behind the pooling takes embeddings back to the original's.

    Example: dotexport shrink ./all-MiniLM-L6-v2 -o out --params 0.8x --calib text.txt
    """
    from dotexport.encoders import encoder_shrinking

    with progress() as report:
        shrunk = encoder_shrinking.shrink(model, out, options, overwrite=overwrite, progress=report)
    if as_json:
        show_json(shrunk.as_dict())
        return
    show(out, f"narrowed in {shrunk.seconds:.0f} s")


@app.command()
@with_options
def plan(model: Folder, options: SizeOptions, as_json: Json = False) -> None:
    """Sizes that meet a budget: each is what shrink would narrow to choose the closest.

    Bytes are those of hf/ as the original is stored; int8 artifacts take about a byte a parameter.

    Example: dotexport plan ./all-MiniLM-L6-v2 --params 0.7x
    """
    from dotexport.encoders.encoder_planning import plan as planned

    with progress() as report:
        record = planned(model, options, report)
    if as_json:
        show_json(record)
        return
    show_plan(record, str(model))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Output of dotexport, or a plain encoder.")],
    target: Annotated[
        list[str],
        typer.Option(help="onnx, openvino or executorch, or NAME:PRECISION, e.g. onnx:int8."),
    ],
    out: Home = None,
    verify: Held = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write artifacts of a text encoder, each held against torch before it is kept.

    onnx (fp32, fp16, int8) is what transformers.js, Optimum and sentence-transformers' onnx backend
    read, openvino (fp32, fp16, int8) what its openvino backend reads, executorch (fp32) a program
    for phones.

    Example: dotexport export OUT --target onnx:int8 --target openvino
    """
    from dotexport.encoders import encoder_exporting

    with progress() as report:
        names = encoder_exporting.export(
            model, target, out=out, verify=verify, overwrite=overwrite, progress=report
        )
    show_written(out or model, names, as_json=as_json)


@app.command()
def verify(
    out: Output,
    target: Only = None,
    as_json: Json = False,
) -> None:
    """Hold every artifact against torch: its files, and what it answers to padded and long batches.

    Exit code 3 if one of them does not compute what torch computes.
    """
    from dotexport.encoders import encoder_verifying
    from dotexport.exports.verifying import require

    with stderr.status("verifying"):
        parities = encoder_verifying.verify(out, target)
    if as_json:
        show_json([parity.as_dict() for parity in parities])
    else:
        show_parities(parities)
    require(parities)


@app.command("eval")
@with_options
def evaluate(
    out: Output,
    baseline: Annotated[Path, typer.Option(help="The original encoder.")],
    options: SentenceOptions,
    target: Annotated[
        str | None,
        typer.Option(help="An artifact of it instead, through its runtime: onnx-int8, onnx:int8."),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Rows with answers, a line of JSON each, for a model with a task head: one or two "
            "texts by GLUE's names and a label, or SQuAD's context, question and answers."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Embeddings beside the original's: mean cosine, and recall@10 of the original's neighbours.

    Of models with a task head also how often both name the same class, and the divergence of class
    probabilities; of `--labelled` rows what GLUE and SQuAD measure, of both models.

    Example: dotexport eval OUT --baseline ./all-MiniLM-L6-v2 --text held-out.txt
    """
    from dotexport.encoders.encoder_quality import evaluate_into

    with progress() as report:
        record = evaluate_into(
            out, baseline, options, spec=target, labelled=labelled, progress=report
        )
    if as_json:
        show_json(record)
        return
    show(out, "quality")


@app.command()
@with_options
def bench(
    candidate: Output,
    baseline: Annotated[Path, typer.Option(help="The original encoder.")],
    options: TurnOptions,
    target: Annotated[
        str, typer.Option(help="onnx, openvino, executorch, NAME:PRECISION, or torch.")
    ] = "onnx",
    batch: Annotated[int, typer.Option(min=1, help="Sentences at once.")] = 1,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    as_json: Json = False,
) -> None:
    """Latency of one call on a batch of sentences, sentences per second and bytes, against the
    original.

    Both run in this process and take turns (A B B A). What has no artifact for the target yet is
    exported into a temporary folder first.

    Example: dotexport bench OUT --baseline ./all-MiniLM-L6-v2 --target onnx:int8 --batch 32
    """
    from dotexport.app.door import benches

    with progress() as report:
        record = benches().bench_encoder(
            candidate, baseline, target, options, batch=batch, seqlen=seqlen, progress=report
        )
    if as_json:
        show_json(record)
        return
    show(candidate, "speed")


@app.command()
@with_options
def frontier(
    model: Folder,
    options: SentenceOptions,
    times: RoundOptions,
    narrowed: Annotated[
        list[Path] | None, typer.Argument(help="Outputs of dotexport shrink for this original.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="NAME for all precisions of one target, or NAME:PRECISION (onnx)."),
    ] = None,
    other: Annotated[
        str | None, typer.Option(help="A second text, of another kind; as --text.")
    ] = None,
    out: Kept = None,
    as_json: Json = False,
) -> None:
    """Original and narrowed encoders in every precision of a target, at equal bytes.

    Bytes, cosine and recall@10 on held-out sentences, and sentences per second (of --batch rows of
    --seqlen tokens) of each artifact; which of them nothing beats in bytes and cosine; and the
    verdict in words. With a task head: agreement and divergence of its answers.

    Example: dotexport frontier ./all-MiniLM-L6-v2 OUT --text a.txt --other b.txt -o frontier
    """
    from dotexport.app.door import benches

    texts = [options, *([replace(options, source=other)] if other else [])]
    with progress() as report:
        found = benches().frontier_encoder(
            model,
            narrowed or [],
            target or ["onnx"],
            texts,
            rounds=times if times.timed else None,
            out=out,
            progress=report,
        )
        if out is not None:
            benches().write_frontier(found, out)
    show_frontier(found, out, as_json=as_json)


def show(out: Path, title: str) -> None:
    """Original beside narrowed, for whatever figures the manifest holds."""
    from dotexport.encoders import encoder_card
    from dotexport.storage import manifest

    rows = encoder_card.rows(manifest.read(out))
    show_figures(rows, "narrowed", title, f"model {out / 'hf'}")


def show_plan(record: Mapping[str, Any], model: str) -> None:
    """A line per choice, the original first."""
    from rich.console import Console
    from rich.table import Table

    original, choices = record["original"], record["choices"]
    names = [name for name in choices[0] if name not in ("ratio", "bytes")]
    table = Table(title=model)
    for column in ("", "stream", "neurons", "layers", "tokens", "parameters", "ratio", "MB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for number, row in enumerate((original, *choices)):
        ratio = row["parameters"] / original["parameters"]
        figures = (f"{row[name]:,}" for name in names)
        label = str(number) if number else "original"
        table.add_row(label, *figures, f"{ratio:.3f}x", f"{row['bytes'] / 1e6:,.2f}")
    Console().print(table)
    stderr.print(
        "next: dotexport shrink MODEL -o OUT with the same flags and --calib TEXT narrows "
        "these, in narrower streams for as long as that helps, and keeps the one whose embeddings "
        "are closest",
        soft_wrap=True,
        highlight=False,
    )


def show_parities(parities: Sequence[Parity]) -> None:
    """How far each artifact is from torch, the limit it is held to, and the verdict."""
    from rich.table import Table

    table = Table("artifact", "difference (limit)", "batch x tokens", "verdict")
    for parity in parities:
        known = parity.difference is not None
        table.add_row(
            parity.artifact,
            f"{parity.difference:.2g} ({parity.limit:.2g})" if known else "",
            ", ".join(parity.shapes),
            "passed" if parity.passed else "; ".join(parity.problems),
        )
    stderr.print(table)
