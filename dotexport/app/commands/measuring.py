"""The verbs that measure time: bench, latency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dotexport.app.commands.shared_options import VLLM, Json, Model
from dotexport.app.terminal import progress, show_json, show_latency, stderr
from dotexport.errors import UsageError


def bench(
    context: typer.Context,
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
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="gguf: folder of llama.cpp to run the files in; without, torch does."),
    ] = None,
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
    _refuse_strangers(context, served=target == "vllm")
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
    from dotexport.app.pipeline import bench_into, judge_bench, source_folder, sweep_into
    from dotexport.app.recipe import BenchStep
    from dotexport.bench.gate import require
    from dotexport.bench.sweep import steps_of
    from dotexport.bench.table import render
    from dotexport.bench.verdicts import gate_table

    if noise == (baseline is not None):
        raise UsageError("expected either --baseline MODEL, or --noise-check without a baseline")
    step = BenchStep(
        target=target,
        precision=precision,
        device=device,
        dtype=dtype,
        compiled=compiled,
        llama_cpp=None if llama_cpp is None else str(llama_cpp.resolve()),
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
    rounds: Annotated[
        int, typer.Option(help="A B B A turns of each size, in fresh processes.")
    ] = 4,
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
    from dotexport.app.pipeline import measure_latency, source_folder

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


# Flags of bench that the other kind of measurement would pass over in silence.
OF_VLLM = ("vllm_python", "vllm_bench", "vllm_rounds", "vllm_args", "requests", "request_rate")
OF_OTHERS = (
    *("noise", "runs", "device", "dtype", "compiled", "llama_cpp", "preset", "rounds"),
    *("roofline", "min_seconds", "gate"),
)


def _refuse_strangers(context: typer.Context, *, served: bool) -> None:
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in (OF_OTHERS if served else OF_VLLM)
        and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    if given:
        whose = "not for vLLM's own benchmarks" if served else "for --target vllm alone"
        raise UsageError(
            f"{', '.join(given)}: {whose}; dotexport bench --help says what each is for"
        )


def _bench_vllm(
    candidate: Path,
    baseline: str | None,
    python: Path | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    from dotexport.app.pipeline import bench_vllm_into, source_folder
    from dotexport.bench.vllm.served_table import render

    if baseline is None or python is None:
        raise UsageError("--target vllm needs --baseline MODEL and --vllm-python PATH")
    with progress() as report:
        result = bench_vllm_into(
            candidate, source_folder(baseline), python, report=out, progress=report, **asked
        )
    Console(stderr=as_json).print(render(result))
    show_json(result.as_dict() if as_json else result.headline())
