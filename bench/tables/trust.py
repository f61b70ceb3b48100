"""Whether the bench itself can be trusted: the tables docs/results/trust-*.

    python -m dotexport.bench trust noise      # A against A holds 1
    python -m dotexport.bench trust slowdown   # a planted slowdown is found
    python -m dotexport.bench trust smollm     # speed-up against the ratio of bytes
    python -m dotexport.bench trust judge      # onnxruntime-genai, timed by itself, agrees
    python -m dotexport.bench trust promise    # budgets of time are kept

Take them on a machine that does nothing else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport import embedded
from dotexport.app.pipeline import keep_promise, measure_latency
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.carrying import planned_config
from dotexport.axes.plan import SizeOptions
from dotexport.errors import RuntimeMissingError, SizeError
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.sizes.budget import plan
from dotexport.sizes.latency_options import LatencyOptions

from ..measure import bench, noise_check
from ..outside import genai
from ..result import BenchResult
from ..stand_in import SMOLLM2_135M, TOKENIZER, write_stand_in
from ..sweeps import NOISE_SHARE
from ..workload import Workload, usable_cores
from .result_files import RESULTS, Out, Table, save

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Runs = Annotated[int, typer.Option(help="Benches, one after another.")]
Seconds = Annotated[float, typer.Option(help="Measured seconds of each model, at least.")]
Rounds = Annotated[int, typer.Option(help="Pairs of fresh processes.")]
Prompt = Annotated[int, typer.Option(help="Tokens of a prompt.")]
Generate = Annotated[int, typer.Option(help="Tokens generated.")]
Threads = Annotated[int | None, typer.Option(help="Default: one per core.")]

RUNTIMES = (("ort-cpu", "fp32"), ("ort-cpu", "int4"), ("hf", "as-stored"))
ENOUGH = 0.9  # of the ratio of bytes
AGREES = 0.1


@app.command()
def noise(
    out: Out = RESULTS,
    runs: Runs = 10,
    seconds: Seconds = 10.0,
    rounds: Rounds = 8,
    threads: Threads = None,
) -> None:
    """A against A on the embedded model: the 95 % interval holds 1 in at least 9 of 10."""
    workload = Workload(min_seconds=seconds, rounds=rounds, threads=threads).with_threads()
    with _embedded() as model:
        rows = [
            _run_row(run, noise_check(model, "ort-cpu", precision="fp32", workload=workload))
            for run in range(1, runs + 1)
        ]
    held = sum(row["holds 1"] == "yes" for row in rows)
    word = "PASS" if held >= NOISE_SHARE * runs else "FAIL"
    save(
        out / "trust-noise",
        "The bench against itself: A against A",
        f"{word}: the 95 % interval of the end-to-end ratio holds 1 in {held} of {runs} runs; 9 of "
        f"10 are asked for. The embedded model on ort-cpu fp32 as both candidate and baseline. "
        f"{_protocol(workload)}",
        rows,
    )


@app.command()
def slowdown(
    out: Out = RESULTS,
    runs: Runs = 10,
    seconds: Seconds = 10.0,
    rounds: Rounds = 8,
    threads: Threads = None,
    share: Annotated[float, typer.Option(help="Planted, of each step.")] = 0.1,
) -> None:
    """A candidate that waits 10 % of each step is called slower in 10 of 10."""
    workload = Workload(min_seconds=seconds, rounds=rounds, threads=threads).with_threads()
    with _embedded() as model:
        rows = [
            _run_row(
                run,
                noise_check(
                    model, "ort-cpu", precision="fp32", workload=workload, planted_slowdown=share
                ),
            )
            for run in range(1, runs + 1)
        ]
    found = sum(" slower " in row["verdict"] for row in rows)
    save(
        out / "trust-slowdown",
        f"A planted slowdown of {share:.0%}".replace("%", " %"),
        f"{'PASS' if found == runs else 'FAIL'}: found in {found} of {runs} runs. The embedded "
        f"model on ort-cpu fp32 against itself, the candidate busy for another {100 * share:.0f} % "
        f"of the processor time of each prefill and each step. {_protocol(workload)}",
        rows,
    )


@app.command()
def smollm(
    out: Out = RESULTS,
    seconds: Seconds = 10.0,
    rounds: Rounds = 5,
    threads: Threads = None,
    budget: Annotated[list[str] | None, typer.Option(help="Default: 0.8x, 0.7x, 0.5x.")] = None,
    layers: Annotated[int, typer.Option(help="Fewer are a trial.")] = 30,
    prompt: Prompt = 128,
    generate: Generate = 64,
) -> None:
    """SmolLM2-135M's sizes with random weights: decode speed-up against the ratio of bytes."""
    workload = Workload(
        prompt_length=prompt,
        generation_length=generate,
        min_seconds=seconds,
        rounds=rounds,
        threads=threads,
    ).with_threads()
    config = SMOLLM2_135M | {"num_hidden_layers": layers}
    rows: Table = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = write_stand_in(Path(scratch) / "dense", config, TOKENIZER).folder
        for asked in budget or ["0.8x", "0.7x", "0.5x"]:
            decided = plan(config, SizeOptions(params=asked))
            narrowed = write_stand_in(
                Path(scratch) / asked, planned_config(config, decided), TOKENIZER
            ).folder
            for target, precision in RUNTIMES:
                result = bench(narrowed, dense, target, precision=precision, workload=workload)
                rows.append(_speed_row(asked, result))
                typer.echo(json.dumps(rows[-1]), err=True)
    enough = sum(row["speed-up / ratio"] >= ENOUGH for row in rows)
    save(
        out / "trust-smollm",
        "Decode speed-up against the ratio of bytes, at SmolLM2-135M's sizes",
        f"{enough} of {len(rows)} reach {ENOUGH} of the ratio of bytes that a decoded token reads "
        f"(weights and cache). Random weights, {layers} layers, sizes of dotexport's planner. "
        f"`binds`: what most of the narrowed model's time goes to. {_protocol(workload)}",
        rows,
    )


@app.command()
def judge(
    out: Out = RESULTS,
    rounds: Rounds = 8,
    threads: Threads = None,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's sizes; fewer are a trial.")] = 30,
    prompt: Prompt = 128,
    generate: Generate = 64,
    runs: Runs = 3,
) -> None:
    """onnxruntime-genai's own generator, timed outside of the bench, on the same folder."""
    if missing := find_target("ort-cpu").missing():
        raise RuntimeMissingError(f"the judge cannot run here: {', '.join(missing)}")
    workload = Workload(
        prompt_length=prompt, generation_length=generate, rounds=rounds, threads=threads
    ).with_threads()
    with tempfile.TemporaryDirectory() as scratch:
        config = SMOLLM2_135M | {"num_hidden_layers": layers}
        checkpoint = write_stand_in(Path(scratch) / "model", config, TOKENIZER)
        folder = Path(scratch) / "ort-cpu-fp32"
        folder.mkdir()
        find_target("ort-cpu").write(checkpoint, folder, "fp32")
        rows = [row for run in range(1, runs + 1) for row in _judged(run, folder, workload)]
    agreed = [abs(row["ours / genai"] - 1) <= AGREES for row in rows if row["phase"] == "decode"]
    save(
        out / "trust-judge",
        "Agreement with onnxruntime-genai",
        f"Decode within {100 * AGREES:.0f} % in {sum(agreed)} of {runs} runs. SmolLM2-135M's "
        f"sizes, {layers} layers, random weights, ort-cpu fp32; {prompt} tokens in, {generate} "
        f"out, {workload.threads} of {usable_cores()} cores. The judge is onnxruntime-genai's "
        "Generator, timed as its benchmark script does (the wheel ships none): prefill is "
        "append_tokens and the first generate_next_token, decode the mean of the others. "
        f"{rounds} rounds of four fresh processes each: judge, bench, bench, judge. Medians, and "
        "the ratio with its 95 % interval.",
        rows,
    )


def _judged(run: int, folder: Path, workload: Workload) -> Table:
    rows: Table = []
    for metric, (ours, theirs, over) in genai.disagreement(folder, workload).items():
        phase = {"ttft": "prefill", "tpot": "decode"}[metric]
        times = {"ours, ms": ours, "genai, ms": theirs, "ours / genai": over.ratio}
        rows.append({"run": run, "phase": phase, **times, "from": over.low, "to": over.high})
        typer.echo(json.dumps(rows[-1]), err=True)
    return rows


@app.command()
def promise(
    out: Out = RESULTS,
    budget: Annotated[list[str] | None, typer.Option(help="Default: 0.9x, 0.8x, 0.7x.")] = None,
    points: Annotated[int, typer.Option(help="Sizes of each axis in a table.")] = 4,
    rounds: Rounds = 4,
    threads: Threads = None,
) -> None:
    """Budgets of time on the embedded model: what a latency table promises, measured again."""
    rows: Table = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in ("fp32", "int4"):
            table, file = measure_latency(
                embedded.MODEL_DIR,
                LatencyOptions(precision=precision, points=points, rounds=rounds, threads=threads),
                out=Path(scratch) / f"{precision}.json",
            )
            for asked in budget or ["0.9x", "0.8x", "0.7x"]:
                folder = Path(scratch) / f"{precision}-{asked}"
                rows.append(_promised_row(f"ort-cpu {precision}", asked, file, folder))
                typer.echo(json.dumps(rows[-1]), err=True)
    missed = sum(row["verdict"] == "missed" for row in rows)
    asked_of = table["workload"]
    save(
        out / "trust-promise",
        "Budgets of time, promised and measured",
        f"{missed} of {len(rows)} missed beyond their interval. Time per decoded token, narrowed "
        f"over original; the embedded model on ort-cpu, {asked_of['prompt']} tokens in, "
        f"{asked_of['generate']} out, {table['threads']} of {usable_cores()} cores. `promised` is "
        f"what a latency table of {points} sizes per axis says, `measured` a short bench of the "
        "model that came out, with its 95 % interval.",
        rows,
    )


def _promised_row(runtime: str, asked: str, table: Path, folder: Path) -> dict[str, Any]:
    sizes = SizeOptions(latency=asked, latency_table=str(table))
    text = TextOptions(source="embedded:calibration", samples=16, seqlen=256)
    options = ShrinkOptions(sizes=sizes, text=text, narrow=NarrowOptions(local=None))
    try:
        made = shrink(embedded.MODEL_DIR, folder, options, device="cpu").plan
    except SizeError:
        return {"runtime": runtime, "budget": asked, "verdict": "no size comes to it"}
    found = keep_promise(folder, embedded.MODEL_DIR, sizes)["latency"]
    return {
        "runtime": runtime,
        "budget": asked,
        "hidden": made.after.hidden_size,
        "MLP": made.after.intermediate_size,
        "KV heads": made.after.num_key_value_heads,
        "parameters": f"{made.ratio:.3f}x",
        "promised": found["predicted"],
        "measured": found["measured"]["ratio"],
        "from": found["measured"]["low"],
        "to": found["measured"]["high"],
        "verdict": found["verdict"],
    }


def _run_row(run: int, result: BenchResult) -> dict[str, Any]:
    whole = result.comparisons["e2el"]
    row = {
        "run": run,
        "ratio": whole.ratio,
        "from": whole.low,
        "to": whole.high,
        "holds 1": "yes" if whole.low <= 1 <= whole.high else "no",
        "verdict": whole.verdict,
        "decode": result.comparisons["tpot"].verdict,
        "harness, share of a token": result.candidate.overhead_share,
        "load before": (result.environment["load_average"] or [0.0])[0],
    }
    typer.echo(json.dumps(row), err=True)
    return row


def _speed_row(asked: str, result: BenchResult) -> dict[str, Any]:
    decode = result.comparisons["tpot"]
    costs = [model.cost for model in (result.candidate, result.baseline)]
    read = [cost.decode(result.workload).num_bytes for cost in costs if cost is not None]
    assert len(read) == 2  # both are of a family that dotexport writes
    assert result.roofline is not None
    ratio = read[1] / read[0]
    limits = {name: phases["decode"] for name, phases in result.roofline.limits.items()}
    return {
        "parameters": asked,
        "runtime": f"{result.target} {result.precision}",
        "MB read, dense": read[1] / 1e6,
        "MB read": read[0] / 1e6,
        "ratio of bytes": ratio,
        "decode speed-up": 1 / decode.ratio,
        "from": 1 / decode.high,
        "to": 1 / decode.low,
        "speed-up / ratio": 1 / decode.ratio / ratio,
        "dense, of the limit": limits["baseline"].share,
        "of the limit": limits["candidate"].share,
        "binds": limits["candidate"].binds,
        "can bring": result.roofline.gains["decode"].beside_overhead,
    }


@contextmanager
def _embedded() -> Iterator[Path]:
    """The embedded model as an artifact of ort-cpu fp32, written once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ort-cpu-fp32"
        folder.mkdir()
        find_target("ort-cpu").write(Checkpoint.open(embedded.MODEL_DIR), folder, "fp32")
        yield folder


def _protocol(workload: Workload) -> str:
    return (
        f"{workload.prompt_length} tokens in, {workload.generation_length} out, batch "
        f"{workload.batch_size}, {workload.threads} of {usable_cores()} cores; at least "
        f"{workload.min_seconds:g} s and {workload.min_iterations} requests of each model in "
        f"{workload.rounds} rounds of fresh processes, A B B A."
    )
