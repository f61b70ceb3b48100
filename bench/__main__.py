"""`python -m dotexport.bench`: measure two models from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dotexport.errors import DotexportError, UsageError

from .measure import bench, noise_check
from .result import BenchResult
from .table import render
from .workload import Workload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Workload()


@app.command()
def main(
    candidate: Annotated[
        Path, typer.Argument(help="Output of dotexport, model folder, or artifact of the target.")
    ],
    baseline: Annotated[
        Path | None, typer.Option(help="What to compare with: usually the original model folder.")
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise-check", help="Measure CANDIDATE against itself.")
    ] = False,
    target: Annotated[str, typer.Option(help="Runtime to measure on.")] = "ort-cpu",
    precision: Annotated[str | None, typer.Option(help="Precision of both artifacts.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = DEFAULT.prompt_length,
    generate: Annotated[int, typer.Option(help="Tokens generated.")] = DEFAULT.generation_length,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = DEFAULT.batch_size,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: one per physical core.")
    ] = None,
    min_iterations: Annotated[
        int, typer.Option(help="Requests of each model, at least.")
    ] = DEFAULT.min_iterations,
    min_seconds: Annotated[
        float, typer.Option(help="Measured seconds of each model, at least.")
    ] = DEFAULT.min_seconds,
    warmups: Annotated[
        int, typer.Option(help="Requests before measuring, at least.")
    ] = DEFAULT.min_warmups,
    seed: Annotated[int, typer.Option(help="Of token ids and bootstrap.")] = DEFAULT.seed,
    out: Annotated[
        Path | None,
        typer.Option(help="File of the report; default: CANDIDATE/reports/bench.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Full report on stdout.")] = False,
) -> None:
    """Measure CANDIDATE against a baseline: latency, throughput, memory, size.

    Both run in fresh processes on the same runtime and take turns (A B B A). What has no artifact
    for the target yet is exported into a temporary folder first.

    Example: python -m dotexport.bench OUT --baseline MODEL --target ort-cpu
    """
    if noise == (baseline is not None):
        raise UsageError("expected either --baseline MODEL, or --noise-check without a baseline")
    workload = Workload(
        prompt_length=prompt,
        generation_length=generate,
        batch_size=batch,
        threads=threads,
        min_iterations=min_iterations,
        min_seconds=min_seconds,
        min_warmups=warmups,
        seed=seed,
    )
    with Console(stderr=True).status("starting") as status:

        def show(stage: str, done: int, total: int) -> None:
            status.update(f"{stage}, {done} of {total} %" if done else stage)

        if baseline is None:
            result = noise_check(
                candidate, target, precision=precision, workload=workload, out=out, progress=show
            )
        else:
            result = bench(
                candidate,
                baseline,
                target,
                precision=precision,
                workload=workload,
                out=out,
                progress=show,
            )
    report(result, as_json=as_json)


def report(result: BenchResult, *, as_json: bool) -> None:
    """A table for people, then JSON for programs: all of it if asked for, else one line."""
    Console(stderr=as_json).print(render(result))
    sys.stdout.write(json.dumps(result.as_dict() if as_json else result.headline()) + "\n")


def run() -> None:
    """The command, with errors as one message and an exit code."""
    try:
        app()
    except DotexportError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    run()
