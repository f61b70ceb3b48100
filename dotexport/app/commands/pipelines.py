"""The verbs of the command line for diffusers pipelines: one function per verb, no logic.

`dotexport shrink FOLDER`, `export`, `verify`, `eval` and `bench` come here when FOLDER is a
pipeline (it has a model_index.json) or an output that holds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dotexport.app.flags import with_options
from dotexport.app.progress import progress
from dotexport.app.terminal import show_figures, show_json, show_written, stderr
from dotexport.app.turn_options import TurnOptions
from dotexport.diffusion.pipeline_options import PruneStep, SampleOptions, parse_extra

from .shared_options import Held, Home, Json, Only, Out, Overwrite

if TYPE_CHECKING:
    from dotexport.diffusion.onnx_folder import Parity

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

Pipeline = Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline.")]
Output = Annotated[Path, typer.Argument(help="Output of dotexport shrink for a pipeline.")]
Extra = Annotated[
    list[str] | None,
    typer.Option("--pipeline-arg", help="NAME=VALUE for the pipeline's call; may be repeated."),
]


@app.callback()
def verbs() -> None:
    """Verbs of their own for diffusion pipelines."""


@app.command()
@with_options
def shrink(
    model: Pipeline,
    out: Out,
    step: PruneStep,
    pipeline_arg: Extra = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished packages, and go on from them.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune the denoiser of a diffusers pipeline in one shot; no picture is needed.

    Calibrates on the pipeline's own sampling trajectories. OUT/pipeline loads with diffusers.

    Example: dotexport shrink ./sd3 -o out --params 0.75x --calib prompts.txt
    """
    from dotexport.diffusion import pipeline_shrinking

    options = step.options(parse_extra(pipeline_arg or []))
    with progress() as report:
        shrunk = pipeline_shrinking.shrink(
            model, out, options, overwrite=overwrite, resume=resume, progress=report
        )
    if as_json:
        show_json(shrunk.as_dict())
        return
    show(out, f"pruned in {shrunk.seconds:.0f} s")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Output of dotexport, or a plain pipeline.")],
    target: Annotated[list[str], typer.Option(help="onnx, onnx:fp32 or onnx:fp16.")],
    out: Home = None,
    verify: Held = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write ONNX graphs of every component, as ORTDiffusionPipeline of optimum-onnx reads them.

    Each artifact is kept only if it computes what torch computes.

    Example: dotexport export OUT --target onnx
    """
    from dotexport.diffusion import onnx_folder

    with progress() as report:
        names = onnx_folder.export(
            model, target, out=out, verify=verify, overwrite=overwrite, progress=report
        )
    show_written(out or model, names, as_json=as_json)


@app.command()
def verify(
    out: Output,
    target: Only = None,
    as_json: Json = False,
) -> None:
    """Hold every artifact against torch: one call of each component, and a sampled trajectory.

    Exit code 3 if one of them does not compute what torch computes.
    """
    from dotexport.diffusion import onnx_folder
    from dotexport.exports.verifying import require

    with stderr.status("verifying"):
        parities = onnx_folder.verify(out, target)
    if as_json:
        show_json([parity.as_dict() for parity in parities])
    else:
        show_parities(parities)
    require(parities)


@app.command("eval")
@with_options
def evaluate(
    out: Output,
    baseline: Annotated[Path, typer.Option(help="The original pipeline.")],
    options: SampleOptions,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="safetensors with `latents`, one per prompt; default: samples of the original."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Space of the Frechet distance: latents, pixels or MODULE:FUNCTION. It is not "
            "monotone; trust loss and deviation."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Noises per held-out latent.")] = 8,
    pipeline_arg: Extra = None,
    as_json: Json = False,
) -> None:
    """Held-out denoising loss, deviation of samples at the same noise, and a grid of both.

    Example: dotexport eval OUT --baseline ./sd3 --text prompts.txt --features pixels
    """
    from dotexport.diffusion.evaluating import evaluate_into

    options = replace(options, extra=parse_extra(pipeline_arg or []))
    with progress() as report:
        record = evaluate_into(
            out,
            baseline,
            options,
            held_out=held_out,
            features=features,
            repeats=repeats,
            progress=report,
        )
    if as_json:
        show_json(record)
        return
    show(out, "quality")
    stderr.print(f"grid {out / 'reports/grid.png'}", soft_wrap=True, highlight=False)


@app.command()
@with_options
def bench(
    candidate: Output,
    baseline: Annotated[Path, typer.Option(help="The original pipeline.")],
    options: TurnOptions,
    target: Annotated[str, typer.Option(help="onnx, onnx:fp16, or torch.")] = "onnx",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole pipeline.")] = 4,
    as_json: Json = False,
) -> None:
    """Latency of one step of the denoiser and of the whole pipeline, against the original.

    Both run in this process and take turns (A B B A). What has no artifact for the target yet is
    exported into a temporary folder first.

    Example: dotexport bench OUT --baseline ./sd3 --threads 1
    """
    from dotexport.app.door import benches

    with progress() as report:
        record = benches().bench_pipeline(
            candidate, baseline, target, options, batch=batch, steps=steps, progress=report
        )
    if as_json:
        show_json(record)
        return
    show(candidate, "speed")


# Behind the verbs -------------------------------------------------------------------------------


def show_parities(parities: Sequence[Parity]) -> None:
    """What each artifact differs from torch, the limit it is held to, and the verdict."""
    from rich.table import Table

    table = Table("artifact", "one call", "trajectory", "at", "verdict", title="difference (limit)")
    for parity in parities:
        table.add_row(
            parity.artifact,
            f"{parity.step:.2g} ({parity.step_limit:.2g})",
            f"{parity.trajectory:.2g} ({parity.trajectory_limit:.2g})",
            "; ".join(parity.cases),
            "passed" if parity.passed else "; ".join(parity.problems),
        )
    stderr.print(table)


def show(out: Path, title: str) -> None:
    """Dense beside pruned, for whatever figures the manifest holds."""
    from dotexport.diffusion import pipeline_card
    from dotexport.storage import manifest

    rows = pipeline_card.rows(manifest.read(out))
    show_figures(rows, "pruned", title, f"pipeline {out / 'pipeline'}")
