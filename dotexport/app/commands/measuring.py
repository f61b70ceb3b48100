"""The verbs that measure time: bench, latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dotexport.app.commands.shared_options import Json, Kept, Model
from dotexport.app.door import benches
from dotexport.app.progress import progress
from dotexport.app.steps import BenchStep, FrontierStep, ServedStep
from dotexport.app.terminal import show_frontier, show_json, show_latency, stderr
from dotexport.errors import UsageError
from dotexport.sizes.latency_options import LatencyOptions


def bench(
    context: typer.Context,
    candidate: Annotated[
        Path, typer.Argument(help="Output of dotexport, model, or artifact of the target.")
    ],
    step: BenchStep,
    served: ServedStep,
    baseline: Annotated[
        str | None, typer.Option(help="What to compare with: usually the original model.")
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise-check", help="Measure CANDIDATE against itself.")
    ] = False,
    runs: Annotated[int, typer.Option(help="Noise checks, one after another.")] = 1,
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
    _refuse_strangers(context, served=step.target == "vllm")
    shape = {
        "prompt": prompt,
        "generate": generate,
        "batch": batch,
        "threads": threads,
        "concurrency": concurrency,
    }
    if step.target == "vllm":
        _bench_vllm(candidate, baseline, step, served, shape, out, as_json)
        return
    if noise == (baseline is not None):
        raise UsageError("expected either --baseline MODEL, or --noise-check without a baseline")
    from dotexport.app.benching import bench_into, judge_bench, sweep_into
    from dotexport.app.pipeline import source_folder

    if step.llama_cpp is not None:
        step = replace(step, llama_cpp=str(Path(step.llama_cpp).resolve()))
    steps = benches().steps_of(step, shape, runs=runs, noise=noise)
    original = None if baseline is None else source_folder(baseline)
    with progress() as report:
        result = (
            bench_into(candidate, original, steps[0], report=out, progress=report)
            if len(steps) == 1
            else sweep_into(candidate, original, steps, report=out, progress=report)
        )
    Console(stderr=as_json).print(benches().render(result))
    show_json(result.as_dict() if as_json else result.headline())
    if step.gate is not None:
        judged = judge_bench(step, result, candidate)
        stderr.print(benches().gate_table(judged.lines))
        benches().require(judged.lines)


def frontier(
    model: Model,
    step: FrontierStep,
    narrowed: Annotated[
        list[Path] | None, typer.Argument(help="Outputs of dotexport shrink, or other models.")
    ] = None,
    out: Kept = None,
    as_json: Json = False,
) -> None:
    """Original and narrowed models in every precision of a target, at equal bytes: what to choose.

    Bytes, divergence and perplexity on text, speed and memory of each artifact; which of them
    nothing beats in bytes and divergence; and the verdict in words.

    Example: dotexport frontier ./llama OUT --target ort-cpu --text a.txt --other b.txt -o frontier
    """
    from dotexport.app.benching import frontier_into
    from dotexport.app.pipeline import source_folder

    with progress() as report:
        found = frontier_into(source_folder(model), narrowed or [], step, out=out, progress=report)
    show_frontier(found, out, as_json=as_json)


def latency(
    model: Model,
    options: LatencyOptions,
    batch: Annotated[str, typer.Option(help="Sequences at once: 1, or several as 1,4.")] = "1",
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
            source_folder(model), options, batch=batch, out=out, progress=report
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
    step: BenchStep,
    served: ServedStep,
    shape: Mapping[str, str | None],
    out: Path | None,
    as_json: bool,
) -> None:
    from dotexport.app.benching import bench_vllm_into
    from dotexport.app.pipeline import source_folder

    if baseline is None or served.python is None:
        raise UsageError("--target vllm needs --baseline MODEL and --vllm-python PATH")
    with progress() as report:
        result = bench_vllm_into(
            candidate,
            source_folder(baseline),
            served,
            step,
            shape,
            report=out,
            progress=report,
        )
    Console(stderr=as_json).print(benches().render_served(result))
    show_json(result.as_dict() if as_json else result.headline())
