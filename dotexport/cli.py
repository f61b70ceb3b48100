"""The command line: one function per verb, no logic. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from dotexport import __version__, bench_cli
from dotexport.errors import DotexportError, RuntimeMissingError, UsageError
from dotexport.terminal import (
    missing_here,
    progress,
    show_allocation,
    show_costs,
    show_diagnosis,
    show_error,
    show_json,
    show_latency,
    show_parities,
    show_rows,
    show_summary,
    stderr,
)


class Verbs(TyperGroup):
    """Ends an interrupted verb with a word and exit code 130, whatever the release of typer.

    A verb that is given a diffusers pipeline is the one of dotexport/diffusion/cli.py instead.
    """

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        # What an output holds so far says nothing of the model that is to replace it.
        given = (arg for before, arg in pairwise(args) if before not in ("-o", "--out"))
        if any(map(_holds_pipeline, given)):
            from dotexport.diffusion.cli import app as pipelines

            known = typer.main.get_command(pipelines)
            if args[0] in getattr(known, "commands", {}):
                return known.resolve_command(ctx, args)  # type: ignore[attr-defined]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            kept = escape(str(error)) or "nothing unfinished was kept"
            stderr.print(f"[bold red]interrupted[/]: {kept}", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from error


def _holds_pipeline(argument: str) -> bool:
    folder = Path(argument)
    try:
        return any((at / "model_index.json").is_file() for at in (folder, folder / "pipeline"))
    except OSError:  # no name of a folder at all
        return False


app = typer.Typer(
    name="dotexport",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Narrow a trained model by optimal transport, export it to every runtime, prove it.

    [bold]dotexport demo[/bold] shows the whole chain on a model that ships inside, offline.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 parity failed, 4 gate failed, 5 impossible sizes or
    unsupported model, 6 runtime missing or provider fell back, 130 interrupted.""",
)
app.add_typer(bench_cli.app)
Model = Annotated[str, typer.Argument(help="Model folder (config.json, *.safetensors) or hub id.")]
Output = Annotated[Path, typer.Argument(help="Output of dotexport shrink, export or run.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; must be new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Samples = Annotated[int, typer.Option(help="Windows of text, at most.")]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens per window; default: 2048 or the model's context.")
]
Skip = Annotated[int, typer.Option(help="Windows left out at the start of the text.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TEXT_HELP = (
    "A .txt file (documents end in <|endoftext|>), a .jsonl file (field text), a folder of .txt, "
    "a dataset id, embedded:calibration or embedded:evaluation."
)
Params = Annotated[
    str | None, typer.Option(help="Parameter budget: 0.7x, 5.2M, 6e9. Sizes are then chosen.")
]
Size = Annotated[str | None, typer.Option(help="Budget of bytes as stored: 0.7x, 300MB, 1.5GB.")]
Latency = Annotated[
    str | None,
    typer.Option(
        help="Budget of time per decoded token: 0.8x of the original's, or 12ms; prefill:0.8x for "
        "prompts, 0.8x@4 for batches of 4."
    ),
]
LatencyTable = Annotated[
    str | None,
    typer.Option(
        help="What dotexport latency measured: its file, or the runtime (ort-cpu:int4) whose table "
        "is in the cache; default: the one in the cache, or torch timed on the spot."
    ),
]
ForceLatencyTable = Annotated[
    bool,
    typer.Option(
        "--force-latency-table", help="Take a table of another device, release or runtime."
    ),
]
Hidden = Annotated[int | None, typer.Option(help="Residual width (hidden_size).")]
Intermediate = Annotated[int | None, typer.Option(help="MLP width (intermediate_size).")]
KvHeads = Annotated[
    int | None,
    typer.Option(help="KV heads (num_key_value_heads); their query heads leave with them."),
]
Tied = Annotated[
    bool | None,
    typer.Option(
        "--tied/--untied",
        help="Whether a shared embedding and head stay shared when the residual width is cut.",
    ),
]
Bias = Annotated[
    bool,
    typer.Option("--bias/--no-bias", help="Give linears biases where the class has them."),
]
Square = Annotated[
    bool,
    typer.Option(
        "--square",
        help="Drop heads along with the width, so that hidden_size == heads x head_dim, for "
        "consumers that take head_dim to be hidden_size / heads.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Take the sizes that dotexport plan MODEL --json printed to it."),
]


VLLM: Any = {"rich_help_panel": "With --target vllm"}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dotexport {__version__}")
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


# Verbs ------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Out = Path("dotexport-demo"),
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe to edit, and stop.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shrink, export, verify, evaluate and bench the model that ships inside; no network."""
    file = Path(__file__).with_name("demo.yaml")
    if print_recipe:
        typer.echo(file.read_text(encoding="utf-8"), nl=False)
        return
    _run(file, out, overwrite, "auto", as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="recipe.yaml; see dotexport demo --print-recipe.")],
    out: Out,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a recipe: the whole chain. Run it again after an interruption and it goes on."""
    _run(recipe, out, overwrite, device, as_json)


@app.command()
def shrink(
    model: Model,
    out: Out,
    calib: Annotated[str, typer.Option(help=f"Calibration text. {TEXT_HELP}")],
    plan_file: PlanFile = None,
    params: Params = None,
    size: Size = None,
    latency: Latency = None,
    latency_table: LatencyTable = None,
    force_latency_table: ForceLatencyTable = False,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
    kv_heads: KvHeads = None,
    tied: Tied = None,
    bias: Bias = False,
    square: Square = False,
    allocate: Annotated[
        str,
        typer.Option(
            help="How a budget is shared between the axes: rule, or measured, which cuts each "
            "alone first and takes minutes."
        ),
    ] = "rule",
    samples: Samples = 128,
    seqlen: Seqlen = None,
    skip: Skip = 0,
    basis: Annotated[
        str | None,
        typer.Option(
            help="Of the residual stream: learned, pca, dot, select, or auto, which measures all; "
            "default: learned, or pca where the head stays tied. Gemma 2 and 3, OLMo 2: dot (the "
            "default), obs, select, auto."
        ),
    ] = None,
    mlp: Annotated[
        str,
        typer.Option(
            help="Neurons: obs, dot (OBS, then transport if refitted), select (magnitude)."
        ),
    ] = "obs",
    heads: Annotated[str, typer.Option(help="KV groups: obs, dot, select; as for --mlp.")] = "obs",
    transport: Annotated[
        str, typer.Option(help="Transport plan: semi-relaxed or balanced.")
    ] = "semi-relaxed",
    epsilon: Annotated[
        float, typer.Option(help="Entropic regularisation of the plan; 0 is exact.")
    ] = 0.05,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Closed-form least-squares repair.")
    ] = True,
    feedback: Annotated[
        bool,
        typer.Option("--feedback/--no-feedback", help="Writers repair earlier drift, too."),
    ] = True,
    ridge: Annotated[
        float | None,
        typer.Option(help="Of every refit; default: per solve the best on held-out windows."),
    ] = None,
    heal: Annotated[
        str,
        typer.Option(
            help="Gradient steps after the refit: local (each sublayer alone, while it is in "
            "memory), a number of steps of distillation of the whole model, both (local+200), or "
            "none. The state of distillation lies in .OUT.healing-* beside OUT: after an "
            "interruption the same command goes on from there."
        ),
    ] = "local",
    heal_samples: Annotated[
        int | None,
        typer.Option(
            help="Windows of the calibration text that healing trains on, from --skip on."
        ),
    ] = None,
    heal_precision: Annotated[
        str, typer.Option(help="bf16, fp32, or auto: bf16 where the device multiplies it.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print these choices as a recipe, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Narrow a model: MODEL in, OUT/hf of the same stock class out.

    Example: dotexport shrink ./llama -o out --params 0.7x --calib text.jsonl

    A diffusers pipeline folder has options of its own: dotexport shrink FOLDER --help
    """
    from dotexport.checkpoint import read_config
    from dotexport.pipeline import keep_promise, source_folder
    from dotexport.recipe import Recipe, ShrinkStep
    from dotexport.shrinking import shrink as narrow

    step = ShrinkStep(
        params=params,
        size=size,
        latency=latency,
        latency_table=latency_table,
        force_latency_table=force_latency_table,
        allocate=allocate,
        hidden=hidden,
        intermediate=intermediate,
        kv_heads=kv_heads,
        tied=tied,
        bias=bias,
        square=square,
        calib=calib,
        samples=samples,
        seqlen=seqlen,
        skip=skip,
        basis=basis,
        mlp=mlp,
        heads=heads,
        transport=transport,
        epsilon=epsilon,
        refit=refit,
        feedback=feedback,
        ridge=ridge,
        heal=heal,
        heal_samples=heal_samples,
        heal_precision=heal_precision,
        seed=seed,
    )
    if plan_file is not None:
        step = step.planned(plan_file, read_config(source_folder(model, config_only=True)))
    options = step.options()
    recipe = Recipe(model=model, shrink=step).dump()
    if print_recipe:
        typer.echo(recipe, nl=False)
        return
    with progress() as report:
        shrunk = narrow(
            source_folder(model),
            out,
            options,
            overwrite=overwrite,
            device=device,
            recipe=recipe,
            progress=report,
        )
        timed = keep_promise(out, source_folder(model), options.sizes, progress=report)
    if as_json:
        show_json(shrunk.as_dict() | timed)
        return
    if shrunk.allocation:
        show_allocation(shrunk.allocation)
    show_summary(out, f"narrowed in {shrunk.seconds:.0f} s")


@app.command()
def plan(
    model: Model,
    params: Params = None,
    size: Size = None,
    latency: Latency = None,
    latency_table: LatencyTable = None,
    force_latency_table: ForceLatencyTable = False,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
    kv_heads: KvHeads = None,
    tied: Tied = None,
    bias: Bias = False,
    square: Square = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:PRECISION that must take the sizes, e.g. gguf:int4."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Devices that share every matrix: heads and MLP must divide.")
    ] = 1,
    group: Annotated[
        int, typer.Option(help="Weights per scale in later quantisation, e.g. 128: rows divide.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Show sizes that all named targets take, and what they cost. Reads config.json only.

    Example: dotexport plan ./llama --params 0.7x --target gguf:int4 --target ort-cpu:int4
    """
    from dotexport.checkpoint import read_config
    from dotexport.pipeline import planned_time, source_folder
    from dotexport.planning import Deployment, choose
    from dotexport.sizing import SizeOptions

    asked = SizeOptions(
        params=params,
        size=size,
        latency=latency,
        latency_table=latency_table,
        force_latency_table=force_latency_table,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_key_value_heads=kv_heads,
        tied=tied,
        bias=bias,
        square=square,
    )
    where = Deployment(targets=tuple(target or ()), tensor_parallel=tensor_parallel, group=group)
    config = read_config(source_folder(model, config_only=True))
    chosen = choose(config, asked, where)
    timed = planned_time(chosen.plan, asked, where.targets)
    if as_json:
        show_json(chosen.as_dict() | timed)
        return
    show_rows("sizes", {"sizes": chosen.plan.as_dict(), **timed})
    show_costs(chosen)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Output of dotexport, or a plain model folder.")],
    target: Annotated[list[str], typer.Option(help="NAME or NAME:PRECISION, e.g. ort-cpu:int4.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="For a plain model folder: where to.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hold each artifact against torch.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write artifacts for runtimes, each held against torch before it is kept.

    Example: dotexport export OUT --target ort-cpu --target ort-cpu:int4
    """
    from dotexport import card, manifest
    from dotexport.exporting import export as write

    with stderr.status(f"exporting {', '.join(target)}"):
        artifacts = write(model, target, out=out, verify=verify, overwrite=overwrite)
    home = artifacts[0].folder.parent
    card.write(home)
    if as_json:
        made = manifest.read(home)["artifacts"]
        show_json({artifact.name: made[artifact.name] for artifact in artifacts})
        return
    for artifact in artifacts:
        note = "" if artifact.parity else "  not verified"
        stderr.print(f"{artifact.folder}  {artifact.num_bytes / 1e6:.2f} MB{note}")


@app.command()
def verify(
    out: Output,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only these, vllm and llama.cpp among them; default: all artifacts."),
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with vLLM, for --target vllm.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama.cpp, for --target llama.cpp.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold every artifact against torch: prefill, cached decode, padding, greedy tokens, NaN.

    Exit code 3 if one of them does not compute what torch computes, 6 if all do as far as can be
    told and one needs a device that is not here. With --target vllm, hf/ is loaded by vLLM, which
    must say torch's greedy tokens; with --target llama.cpp, every GGUF file is run by llama.cpp.
    """
    from dotexport.targets import llamacpp
    from dotexport.targets.served import NAME, verify_vllm
    from dotexport.verifying import require
    from dotexport.verifying import verify as check

    by_vllm = NAME in (target or ())
    if by_vllm != (vllm_python is not None):
        raise UsageError("expected --target vllm and --vllm-python together, or neither")
    if (llamacpp.NAME in (target or ())) != (llama_cpp is not None):
        raise UsageError("expected --target llama.cpp and --llama-cpp together, or neither")
    outside = {NAME, llamacpp.NAME}
    others = None if target is None else [name for name in target if name not in outside]
    with stderr.status("verifying"):
        parities = [] if others == [] else check(out, others)
        if vllm_python is not None:
            parities.append(verify_vllm(out, vllm_python))
        if llama_cpp is not None:
            parities += llamacpp.verify_llama_cpp(out, llama_cpp)
    if as_json:
        show_json([parity.as_dict() for parity in parities])
    else:
        show_parities(parities)
    require(parities)


@app.command("eval")
def evaluate(
    out: Output,
    baseline: Annotated[str, typer.Option(help="The original: folder or hub id.")],
    text: Annotated[str, typer.Option(help=f"Held-out text. {TEXT_HELP}")],
    samples: Samples = 64,
    seqlen: Seqlen = None,
    skip: Skip = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, KL and top-1 agreement on held-out text, the original beside it."""
    from dotexport.pipeline import evaluate_into, source_folder
    from dotexport.recipe import EvalStep

    step = EvalStep(text=text, samples=samples, seqlen=seqlen, skip=skip)
    with progress() as report:
        record = evaluate_into(out, source_folder(baseline), step, device=device, progress=report)
    if as_json:
        show_json(record)
        return
    show_rows("quality", {"quality": record})


@app.command()
def bench(
    candidate: Annotated[
        Path, typer.Argument(help="Output of dotexport, model folder, or artifact of the target.")
    ],
    baseline: Annotated[
        str | None, typer.Option(help="What to compare with: usually the original model.")
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise-check", help="Measure CANDIDATE against itself.")
    ] = False,
    runs: Annotated[int, typer.Option(help="Noise checks, one after another.")] = 1,
    target: Annotated[str, typer.Option(help="Runtime to measure on; hf is torch.")] = "ort-cpu",
    precision: Annotated[str | None, typer.Option(help="Precision of both artifacts.")] = None,
    device: Annotated[str | None, typer.Option(help="hf: cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: fp32, bf16 or fp16.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="hf: decode through torch.compile.")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="chat, rag, edge or offline.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Tokens of a prompt (128); several, 128,512, are a sweep.")
    ] = None,
    generate: Annotated[str | None, typer.Option(help="Tokens generated (64), or several.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences at once (1), or several.")] = None,
    threads: Annotated[
        str | None, typer.Option(help="CPU threads, or several; default: one per physical core.")
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Processes of each model at once, sharing the threads; of vLLM's servers, "
            "requests under way at most (a closed loop)."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Pairs of fresh processes, at least.")] = 8,
    roofline: Annotated[bool, typer.Option(help="Measure the device's own limits too.")] = True,
    min_iterations: Annotated[int, typer.Option(help="Requests of each model, at least.")] = 30,
    min_seconds: Annotated[float, typer.Option(help="Seconds for each model, at least.")] = 10.0,
    warmups: Annotated[int, typer.Option(help="Requests before measuring, at least.")] = 10,
    seed: Annotated[int, typer.Option(help="Of token ids and bootstrap.")] = 0,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with vLLM, for --target vllm.", **VLLM),
    ] = None,
    vllm_bench: Annotated[
        str, typer.Option(help="latency, throughput or serve: which of vLLM's benchmarks.", **VLLM)
    ] = "latency",
    vllm_rounds: Annotated[
        int | None,
        typer.Option(help="A B B A turns; default: 2, and 8 with servers, which stay up.", **VLLM),
    ] = None,
    vllm_args: Annotated[
        str, typer.Option(help="More flags of its engine, e.g. '--enforce-eager'.", **VLLM)
    ] = "",
    requests: Annotated[
        int, typer.Option(help="Requests of each turn (throughput, serve).", **VLLM)
    ] = 32,
    request_rate: Annotated[
        float | None, typer.Option(help="Poisson arrivals for each second (serve).", **VLLM)
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="YAML file of limits; exit code 4 if one is missed. See compare."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File of the report; default: in OUT/reports."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Latency, throughput, memory and bytes of CANDIDATE against a baseline, on this machine.

    Both run in fresh processes on the same runtime and take turns (A B B A). What has no artifact
    for the target yet is exported into a temporary folder first.

    Example: dotexport bench OUT --baseline MODEL --target ort-cpu --precision int4

    Several values make a sweep: dotexport bench OUT --baseline MODEL --batch 1,4,8

    vLLM's own benchmarks: dotexport bench OUT --baseline MODEL --target vllm --vllm-python PATH
    """
    if target == "vllm":
        _bench_vllm(
            candidate,
            baseline,
            vllm_python,
            out,
            as_json,
            kind=vllm_bench,
            prompt=prompt,
            generate=generate,
            batch=batch,
            iterations=min_iterations,
            requests=requests,
            warmups=warmups,
            rounds=vllm_rounds,
            request_rate=request_rate,
            concurrency=concurrency,
            precision=precision,
            threads=threads,
            arguments=vllm_args,
            seed=seed,
        )
        return
    from dotexport.bench.gate import require
    from dotexport.bench.judging import gate_table
    from dotexport.bench.sweep import steps_of
    from dotexport.bench.table import render
    from dotexport.pipeline import bench_into, judge_bench, source_folder, sweep_into
    from dotexport.recipe import BenchStep

    if noise == (baseline is not None):
        raise UsageError("expected either --baseline MODEL, or --noise-check without a baseline")
    step = BenchStep(
        target=target,
        precision=precision,
        device=device,
        dtype=dtype,
        compiled=compiled,
        preset=preset,
        rounds=rounds,
        roofline=roofline,
        min_iterations=min_iterations,
        min_seconds=min_seconds,
        warmups=warmups,
        seed=seed,
        gate=gate,
    )
    shape = {
        "prompt": prompt,
        "generate": generate,
        "batch": batch,
        "threads": threads,
        "concurrency": concurrency,
    }
    steps = steps_of(step, shape, runs=runs, noise=noise)
    original = None if baseline is None else source_folder(baseline)
    with progress() as report:
        result = (
            bench_into(candidate, original, steps[0], report=out, progress=report)
            if len(steps) == 1
            else sweep_into(candidate, original, steps, report=out, progress=report)
        )
    Console(stderr=as_json).print(render(result))
    show_json(result.as_dict() if as_json else result.headline())
    if gate is not None:
        judged = judge_bench(step, result, candidate)
        stderr.print(gate_table(judged.lines))
        require(judged.lines)


@app.command()
def latency(
    model: Model,
    target: Annotated[
        str, typer.Option(help="NAME or NAME:PRECISION of the runtime to measure; hf is torch.")
    ] = "ort-cpu",
    precision: Annotated[str | None, typer.Option(help="Precision of the artifacts.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences at once: 1, or several as 1,4.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    generate: Annotated[int, typer.Option(help="Tokens generated.")] = 32,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: one per physical core.")
    ] = None,
    points: Annotated[int, typer.Option(help="Sizes of each axis, the original's among them.")] = 5,
    least: Annotated[float, typer.Option(help="The narrowest, as a share of each axis.")] = 0.5,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers to measure; default: all, or what 256 MB hold in float32."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="A B B A turns of each size.")] = 4,
    held_out: Annotated[
        int, typer.Option(help="Other sizes, measured to see how far the table is off.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of token ids and held-out sizes.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File of the table; default: in the user's cache."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a latency table: time by size on this device, in the runtime that will be used.

    Random weights of the legal sizes are exported and take turns with the original's; `plan` and
    `shrink --latency` read the table. MODEL needs config.json and a tokenizer; no weights are read.

    Example: dotexport latency ./llama --target ort-cpu:int4 --batch 1,4 -o table.json
    """
    from dotexport.pipeline import measure_latency, source_folder

    with progress() as report:
        table, file = measure_latency(
            source_folder(model),
            target=target,
            precision=precision,
            batch=batch,
            out=out,
            progress=report,
            prompt=prompt,
            generate=generate,
            threads=threads,
            points=points,
            least=least,
            layers=layers,
            rounds=rounds,
            held_out=held_out,
            seed=seed,
        )
    if as_json:
        show_json(table)
        return
    show_latency(table, file)


@app.command()
def targets(as_json: Json = False) -> None:
    """List what can be exported to, and what is missing to use it here."""
    from dotexport.adapter import list_targets

    rows = list_targets()
    if as_json:
        show_json([asdict(row) for row in rows])
        return
    table = Table("target", "precisions", "what", "missing here")
    for row in rows:
        missing = escape(missing_here(row))
        table.add_row(row.name, ", ".join(row.precisions), row.summary, missing)
    Console().print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Which runtimes are here, on what they can compute, what clashes, and what mends it.

    Exit code 6 if something that is installed cannot work.
    """
    from dotexport.targets.doctor import examine

    found = examine()
    if as_json:
        show_json(found.as_dict())
    else:
        show_diagnosis(found)
    if not found.healthy:
        raise typer.Exit(RuntimeMissingError.exit_code)


# Behind the verbs -------------------------------------------------------------------------------


def _run(file: Path, out: Path, overwrite: bool, device: str, as_json: bool) -> None:
    from dotexport.pipeline import run as chain
    from dotexport.recipe import Recipe

    with progress() as report:
        record = chain(Recipe.load(file), out, overwrite=overwrite, device=device, progress=report)
    if as_json:
        show_json(record)
        return
    show_summary(out, "done")


def _bench_vllm(
    candidate: Path,
    baseline: str | None,
    python: Path | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    from dotexport.bench.served_table import render
    from dotexport.pipeline import bench_vllm_into, source_folder

    if baseline is None or python is None:
        raise UsageError("--target vllm needs --baseline MODEL and --vllm-python PATH")
    with progress() as report:
        result = bench_vllm_into(
            candidate, source_folder(baseline), python, report=out, progress=report, **asked
        )
    Console(stderr=as_json).print(render(result))
    show_json(result.as_dict() if as_json else result.headline())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors become one message and the documented exit code."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped run tidies up like Ctrl-C
    try:
        app()
    except DotexportError as error:
        show_error(str(error))
        raise SystemExit(error.exit_code) from error
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        show_error(f"{error.strerror or error}: {error.filename or 'the system refused'}")
        raise SystemExit(DotexportError.exit_code) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        show_error("memory ran out; give fewer --samples, a shorter --seqlen, or --device cpu")
        raise SystemExit(DotexportError.exit_code) from error


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class for the GPU only; on the CPU its allocator says so in words.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


if __name__ == "__main__":
    main()
