"""The verbs of the command line for diffusers pipelines: one function per verb, no logic.

`dotexport shrink FOLDER`, `export`, `verify`, `eval` and `bench` come here when FOLDER is a
pipeline (it has a model_index.json) or an output that holds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dotexport.app.terminal import progress, show_json, stderr

if TYPE_CHECKING:
    from dotexport.diffusion.onnx_folder import Parity

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

Pipeline = Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline.")]
Output = Annotated[Path, typer.Argument(help="Output of dotexport shrink for a pipeline.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; must be new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Prompts = Annotated[
    str, typer.Option(help="File with one prompt per line (or class label, for class-conditional).")
]
Limit = Annotated[int, typer.Option("--samples", help="Prompts that are used, at most.")]
Steps = Annotated[int, typer.Option(help="Steps of the pipeline's own scheduler.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale of real use; default: the pipeline's.")
]
Batch = Annotated[int, typer.Option(help="Pictures at once.")]
Height = Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's.")]
Width = Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's.")]
Extra = Annotated[
    list[str] | None,
    typer.Option("--pipeline-arg", help="NAME=VALUE for the pipeline's call; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="Same seed, same bytes.")]


@app.callback()
def verbs() -> None:
    """Verbs of their own for diffusion pipelines."""


@app.command()
def shrink(
    model: Pipeline,
    out: Out,
    calib: Prompts,
    params: Annotated[
        str | None, typer.Option(help="Budget for the denoiser: 0.75x, 2.5B, 6e9.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Attention heads that stay: 0.75x.")] = None,
    ffn: Annotated[str | None, typer.Option(help="Feed-forward neurons that stay: 0.75x.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help='JSON file with the units to keep: {"transformer_blocks.0.attn": 3}.'),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Zeros instead of smaller layers: 0.5, 2:4, 4:8. Saves neither time nor bytes "
            "in ONNX Runtime or torch without special kernels."
        ),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(help="Between blocks: loss (where the predicted loss is least) or uniform."),
    ] = "loss",
    method: Annotated[
        str,
        typer.Option(
            help="obs (exact group Optimal Brain Surgeon), dot (obs, then removed neurons are "
            "transported onto kept ones), or a baseline: l1, l1-refit, wanda, random."
        ),
    ] = "obs",
    feedback: Annotated[
        bool,
        typer.Option(
            "--feedback/--no-feedback",
            help="Layers aim at what the dense model says, so that later ones repair earlier ones.",
        ),
    ] = False,
    damping: Annotated[float, typer.Option(help="Of the Hessian, share of its diagonal.")] = 1e-4,
    packages: Annotated[
        int, typer.Option(help="Runs of layers calibrated together; more: slower, less memory.")
    ] = 4,
    timestep_weights: Annotated[
        str, typer.Option(help="How steps count: log (early ones more), linear, uniform.")
    ] = "log",
    weight_range: Annotated[
        tuple[float, float], typer.Option(help="Least and greatest weight of a step.")
    ] = (0.8, 1.2),
    samples: Limit = 100,
    steps: Steps = 25,
    guidance: Guidance = None,
    batch: Batch = 4,
    height: Height = None,
    width: Width = None,
    pipeline_arg: Extra = None,
    seed: Seed = 0,
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
    from dotexport.diffusion.calibration import TimestepWeights
    from dotexport.diffusion.layout import LayoutOptions
    from dotexport.diffusion.pruning import PruneOptions
    from dotexport.diffusion.sampling import SampleOptions, parse_extra

    low, high = weight_range
    options = pipeline_shrinking.ShrinkOptions(
        sampling=SampleOptions(
            prompts=calib,
            limit=samples,
            steps=steps,
            guidance=guidance,
            batch=batch,
            height=height,
            width=width,
            seed=seed,
            extra=parse_extra(pipeline_arg or []),
        ),
        layout=None
        if sparsity
        else LayoutOptions(params=params, heads=heads, ffn=ffn, file=layout, allocation=allocation),
        sparsity=sparsity,
        prune=PruneOptions(
            method=method,
            damping=damping,
            packages=packages,
            feedback=feedback,
            weights=TimestepWeights(schedule=timestep_weights, low=low, high=high),
            seed=seed,
        ),
    )
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
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="For a plain pipeline: where to.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hold each artifact against torch.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write ONNX graphs of every component, as ORTDiffusionPipeline of optimum-onnx reads them.

    Each artifact is kept only if it computes what torch computes.

    Example: dotexport export OUT --target onnx
    """
    from dotexport.diffusion import onnx_folder
    from dotexport.storage import manifest

    with progress() as report:
        names = onnx_folder.export(
            model, target, out=out, verify=verify, overwrite=overwrite, progress=report
        )
    home = out or model
    made = manifest.read(home)["artifacts"]
    if as_json:
        show_json({name: made[name] for name in names})
        return
    for name in names:
        size = f"{made[name]['bytes'] / 1e6:.2f} MB"
        stderr.print(f"{home / name}  {size}", soft_wrap=True, highlight=False)


@app.command()
def verify(
    out: Output,
    target: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
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
def evaluate(
    out: Output,
    baseline: Annotated[Path, typer.Option(help="The original pipeline.")],
    text: Prompts,
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
    samples: Limit = 100,
    steps: Steps = 25,
    guidance: Guidance = None,
    batch: Batch = 4,
    height: Height = None,
    width: Width = None,
    pipeline_arg: Extra = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Held-out denoising loss, deviation of samples at the same noise, and a grid of both.

    Example: dotexport eval OUT --baseline ./sd3 --text prompts.txt --features pixels
    """
    from dotexport.diffusion.evaluating import evaluate_into
    from dotexport.diffusion.sampling import SampleOptions, parse_extra

    options = SampleOptions(
        prompts=text,
        limit=samples,
        steps=steps,
        guidance=guidance,
        batch=batch,
        height=height,
        width=width,
        seed=seed,
        extra=parse_extra(pipeline_arg or []),
    )
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
def bench(
    candidate: Output,
    baseline: Annotated[Path, typer.Option(help="The original pipeline.")],
    target: Annotated[str, typer.Option(help="onnx, onnx:fp16, or torch.")] = "onnx",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole pipeline.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    groups: Annotated[
        int, typer.Option(min=2, help="A B B A turns; 8 and more give a verdict.")
    ] = 10,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each model, at least.")] = 5.0,
    seed: Seed = 0,
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
            candidate,
            baseline,
            target,
            batch=batch,
            steps=steps,
            threads=threads,
            groups=groups,
            seconds=seconds,
            seed=seed,
            progress=report,
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
    from rich.console import Console
    from rich.table import Table

    from dotexport.diffusion import pipeline_card
    from dotexport.storage import manifest

    table = Table("", "original", "pruned", "change", title=title)
    for row in pipeline_card.rows(manifest.read(out)):
        table.add_row(*row)
    Console().print(table)
    stderr.print(f"pipeline {out / 'pipeline'}", soft_wrap=True, highlight=False)
