"""The measured tables of docs/results/, each from one command.

    python -m dotexport.bench.tables.results exactness
    python -m dotexport.bench.tables.results stories260k
    python -m dotexport.bench.tables.results embedded
    python -m dotexport.bench.tables.results allocation
    python -m dotexport.bench.tables.results memory
    python -m dotexport.bench.tables.results demo

Every table is written as Markdown and as JSON, with the machine and versions it was taken on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from dotexport import embedded
from dotexport.app.pipeline import bench_into
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import open_source, shrink
from dotexport.app.steps import BenchStep
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.exports.quality import evaluate
from dotexport.exports.reference import load_float32
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.outputs import summary
from dotexport.sizes.budget import plan
from dotexport.storage import manifest
from dotexport.storage.output import write_json, write_text

from ..stand_in import write_stand_in

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Table = list[dict[str, Any]]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")]
RESULTS = Path("docs/results")

CALIBRATION = TextOptions(source="embedded:calibration", samples=128, seqlen=512)
EVALUATION = TextOptions(source="embedded:evaluation", samples=128, seqlen=512)


@app.command()
def exactness(out: Out = RESULTS) -> None:
    """What must change nothing: a rotation at full width, and merging copies of neurons."""
    rows = []
    for name, folder, text in _models():
        options = TextOptions(source=text, samples=4, seqlen=256)
        rows.append({"model": name, "change": "random rotation", **_rotated(folder, options)})
        rows.append({"model": name, "change": "copies merged", **_copies_merged(folder, options)})
    save(
        out / "exactness",
        "Exactness",
        "Largest absolute difference of logits in float32 on 4 windows, without refit. `random "
        "rotation`: the model in a random orthonormal basis of full width. `copies merged`: "
        "a quarter of the MLP neurons of every layer made copies of others, half of them with the "
        "sign of up turned, then merged away; against the model with the copies.",
        rows,
    )


@app.command()
def stories260k(out: Out = RESULTS) -> None:
    """Methods and refit on a real trained Llama of 260,032 parameters; needs DOTEXPORT_ASSETS."""
    model, text = stories()
    options = TextOptions(source=text, samples=400, seqlen=256, skip=100)
    judged_NL = token_windows(model, replace(options, samples=100, skip=0))
    rows = [_quality_row(model, asked, judged_NL) for asked in _ladder(options)]
    save(
        out / "stories260k",
        "stories260k: quality by axis, method and refit",
        "TinyStories windows of 256 tokens; perplexity on the first 100, calibration on the next "
        "400. Parameters count distinct weights: a cut residual stream unties the embedding.",
        rows,
    )


@app.command("embedded")
def embedded_model(
    out: Out = RESULTS,
    params: Annotated[str, typer.Option(help="Budget.")] = "0.7x",
    speed: Annotated[bool, typer.Option(help="Also bench on ORT CPU.")] = True,
) -> None:
    """The model that ships inside: dense, narrowed without and with refit; and its speed."""
    judged_NL = token_windows(embedded.MODEL_DIR, EVALUATION)
    methods = (
        NarrowOptions(refit=False),
        NarrowOptions(basis="select"),
        NarrowOptions(basis="dot"),
        NarrowOptions(mlp="select"),
        NarrowOptions(mlp="obs"),
        NarrowOptions(),
    )
    rows = []
    for narrow in methods:
        asked = ShrinkOptions(sizes=SizeOptions(params=params), text=CALIBRATION, narrow=narrow)
        rows.append(_quality_row(embedded.MODEL_DIR, asked, judged_NL))
    if speed:
        asked = ShrinkOptions(sizes=SizeOptions(params=params), text=CALIBRATION)
        rows += _speed_rows(embedded.MODEL_DIR, asked)
    save(
        out / "embedded",
        f"The embedded model at {params} parameters",
        "Calibration: 128 windows of 512 tokens of embedded:calibration. Quality: 128 windows of "
        "512 tokens of embedded:evaluation. Speed: candidate and baseline in fresh processes, "
        "A B B A, rates as narrowed / original with a 95 % bootstrap interval.",
        rows,
    )


@app.command()
def allocation(
    out: Out = RESULTS, params: Annotated[str, typer.Option(help="Budget.")] = "0.7x"
) -> None:
    """One budget shared between the axes in several ways, on the embedded model."""
    judged_NL = token_windows(embedded.MODEL_DIR, EVALUATION)
    config = Checkpoint.open(embedded.MODEL_DIR).config
    rows = []
    for hidden in (240, 224, 208, 192, 176):
        decided = plan(config, SizeOptions(hidden_size=hidden, params=params))
        asked = ShrinkOptions(
            sizes=SizeOptions(
                hidden_size=hidden, intermediate_size=decided.after.intermediate_size
            ),
            text=CALIBRATION,
        )
        rows.append(_quality_row(embedded.MODEL_DIR, asked, judged_NL))
    save(
        out / "allocation",
        f"Sharing a budget of {params} between the axes",
        "The embedded model, refit on; for each residual width the widest MLP within the budget.",
        rows,
    )


@app.command()
def memory(
    out: Out = RESULTS, hidden: Annotated[int, typer.Option(help="Residual width.")] = 512
) -> None:
    """Peak memory of shrink by number of layers, on random weights: it should not grow."""
    rows = [_memory_row(layers, hidden) for layers in (6, 12, 24)]
    save(
        out / "memory",
        "Peak memory of shrink by depth",
        f"Random Llama of hidden {hidden}, MLP {_mlp(hidden)}, float32; 32 windows of 256 tokens; "
        "a fresh process each. `imports` is what the process holds before it starts.",
        rows,
    )


@app.command()
def demo(out: Out = RESULTS) -> None:
    """`dotexport demo` from a warm environment: how long it takes, and its closing table."""
    command = [sys.executable, "-m", "dotexport.app.cli", "demo", "--json", "-o"]
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        done = subprocess.run([*command, f"{scratch}/out"], check=True, capture_output=True)
        seconds = time.perf_counter() - started
    rows = [row._asdict() for row in summary.rows(json.loads(done.stdout))]
    save(
        out / "demo",
        f"dotexport demo: {seconds:.0f} seconds",
        "The whole chain on the embedded model: narrow, export twice, verify, evaluate, bench "
        "twice. Wall time of the process, packages installed and files in the page cache.",
        rows,
    )


# Rows -------------------------------------------------------------------------------------------


def _models() -> Iterator[tuple[str, Path, str]]:
    yield "embedded", embedded.MODEL_DIR, "embedded:calibration"
    if "DOTEXPORT_ASSETS" in os.environ:
        yield "stories260k", *stories()


def stories() -> tuple[Path, str]:
    if "DOTEXPORT_ASSETS" not in os.environ:
        raise SystemExit("set DOTEXPORT_ASSETS to the folder of stories260k and tinystories")
    assets = Path(os.environ["DOTEXPORT_ASSETS"]).resolve()
    return assets / "stories260k", str(assets / "tinystories" / "train-2MiB.txt")


def _ladder(text: TextOptions) -> Iterator[ShrinkOptions]:
    for refit in (False, True):
        for basis in ("select", "dot", "pca"):
            methods = NarrowOptions(basis=basis, refit=refit)
            yield ShrinkOptions(sizes=SizeOptions(hidden_size=48), text=text, narrow=methods)
        for width in (128, 96):
            for mlp in ("select", "obs", "dot"):
                methods = NarrowOptions(mlp=mlp, refit=refit)
                yield ShrinkOptions(
                    sizes=SizeOptions(intermediate_size=width), text=text, narrow=methods
                )


def _rotated(folder: Path, text: TextOptions) -> dict[str, float]:
    source = open_source(folder)
    same = plan(source.config, SizeOptions(hidden_size=source.config["hidden_size"]))
    untied = replace(same, after=replace(same.after, tied=False))
    width = same.before.hidden_size
    rotation_DD = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    with tempfile.TemporaryDirectory() as scratch:
        narrowed = Path(scratch) / "hf"
        _narrow_exactly(source, untied, narrowed, text, Basis(rotation_DD, "rotation", 1.0))
        return _difference(folder, narrowed, token_windows(folder, text))


def _copies_merged(folder: Path, text: TextOptions) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        twins = Path(scratch) / "twins"
        width = _write_twins(Checkpoint.open(folder), twins)
        source = open_source(twins)
        narrowed = Path(scratch) / "hf"
        _narrow_exactly(
            source, plan(source.config, SizeOptions(intermediate_size=width)), narrowed, text
        )
        return _difference(twins, narrowed, token_windows(folder, text))


def _narrow_exactly(
    source: Checkpoint, decided: Plan, out: Path, text: TextOptions, basis: Basis | None = None
) -> None:
    """Write OUT in float32 whatever the source is stored in: the question is the algebra."""
    out.mkdir()
    windows_NL = token_windows(source.folder, text)
    run = prepare(source, decided, out.parent, windows_NL, NarrowOptions(refit=False))
    specs = {n: replace(s, dtype=torch.float32) for n, s in run.writer.specs.items()}
    run.writer = CheckpointWriter(out, specs)
    run.run(basis)
    run.writer.finish()


def _write_twins(source: Checkpoint, folder: Path) -> int:
    """A float32 copy whose last quarter of MLP neurons repeats the first; returns the others."""
    folder.mkdir()
    for file in (source.folder / "config.json", *source.companions()):
        shutil.copyfile(file, folder / file.name)
    size = source.config["intermediate_size"]
    width = size * 3 // 4 // 8 * 8
    specs = {name: replace(spec, dtype=torch.float32) for name, spec in source.specs.items()}
    writer = CheckpointWriter(folder, specs)
    for name in specs:
        tensor = source.tensor(name).float()
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            signs = torch.ones(size - width)
            signs[::2] = -1.0 if "up_proj" in name else 1.0
            tensor[width:] = signs[:, None] * tensor[: size - width]
        writer.write(name, tensor)
    writer.finish()
    return int(width)


def _difference(one: Path, two: Path, windows_NL: torch.Tensor) -> dict[str, float]:
    with torch.inference_mode():
        original, other = (
            load_float32(Checkpoint.open(folder))(input_ids=windows_NL).logits
            for folder in (one, two)
        )
    largest = float(original.abs().max())
    return {"largest logit": largest, "difference": float((original - other).abs().max())}


def _quality_row(model: Path, asked: ShrinkOptions, judged_NL: torch.Tensor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        shrunk = shrink(model, Path(scratch) / "out", asked)
        quality = evaluate(Path(scratch) / "out" / "hf", model, judged_NL)
    decided = shrunk.plan
    row = {
        "hidden": decided.after.hidden_size,
        "MLP": decided.after.intermediate_size,
        "parameters": f"{decided.ratio:.3f}x",
        "basis": shrunk.basis["method"],
        "MLP method": asked.narrow.mlp,
        "refit": "yes" if asked.narrow.refit else "no",
        "dense perplexity": quality.baseline_perplexity,
        "perplexity": quality.perplexity,
        "ratio": quality.ratio,
        "KL": quality.kl,
        "top-1": quality.top1_agreement,
        "seconds": shrunk.seconds,
    }
    typer.echo(json.dumps(row), err=True)
    return row


def _speed_rows(model: Path, asked: ShrinkOptions) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        shrink(model, out, asked)
        for precision in ("fp32", "int4"):
            step = BenchStep(target="ort-cpu", precision=precision)
            result = bench_into(out, model, step)
            for metric, label in (("ttft", "prefill"), ("tpot", "decode")):
                times = result.comparisons[metric]
                yield {
                    "speed": f"ort-cpu {precision} {label}",
                    "rate ratio": 1 / times.ratio,
                    "from": 1 / times.high,
                    "to": 1 / times.low,
                    "bytes": result.candidate.artifact_bytes / result.baseline.artifact_bytes,
                    "load before": (result.environment["load_average"] or [0.0])[0],
                }


def _mlp(hidden: int) -> int:
    return hidden * 5 // 2


def _memory_row(layers: int, hidden: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        num_bytes = _random_model(model, layers, hidden)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            before, peak, seconds = pool.apply(_shrink_and_measure, (model, Path(scratch) / "out"))
    row = {
        "layers": layers,
        "weights, MB": num_bytes / 1e6,
        "imports, MB": before / 1e6,
        "peak, MB": peak / 1e6,
        "seconds": seconds,
    }
    typer.echo(json.dumps(row), err=True)
    return row


def _random_model(folder: Path, layers: int, hidden: int) -> int:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _mlp(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    tokenizer = [embedded.MODEL_DIR / name for name in ("tokenizer.json", "tokenizer_config.json")]
    return write_stand_in(folder, config, tokenizer).num_bytes


def _shrink_and_measure(model: Path, out: Path) -> tuple[int, int, float]:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    started = time.perf_counter()
    text = replace(CALIBRATION, samples=32, seqlen=256)
    shrink(model, out, ShrinkOptions(sizes=SizeOptions(params="0.7x"), text=text))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return before, peak, time.perf_counter() - started


# Writing ----------------------------------------------------------------------------------------


def save(file: Path, title: str, protocol: str, rows: Table, *, command: str = "") -> None:
    """FILE.md and FILE.json: the table, how it was taken, and on what."""
    machine = manifest.environment()
    command = command or f"python -m dotexport.bench.tables.results {' '.join(sys.argv[1:])}"
    libraries = ", ".join(f"{name} {v}" for name, v in machine["libraries"].items())
    text = f"# {title}\n\n{protocol}\n\n    {command}\n\n{_markdown(rows)}\n"
    text += f"Machine: {machine['cpu']}, {machine['cores']['usable']} cores, "
    text += f"{machine['platform']}, Python {machine['python']}; {libraries}.\n"
    write_text(file.with_suffix(".md"), text)
    write_json(
        file.with_suffix(".json"),
        {"title": title, "command": command, "rows": rows, "environment": machine},
    )
    typer.echo(text)


def _markdown(rows: Table) -> str:
    """One table per kind of row: rows with the same columns stand together."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        columns = tuple(row)
        if columns not in parts:
            rule = "|".join("---" for _ in columns)
            parts[columns] = [f"| {' | '.join(columns)} |", f"|{rule}|"]
        parts[columns].append(f"| {' | '.join(_cell(value) for value in row.values())} |")
    return "\n\n".join("\n".join(lines) for lines in parts.values()) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


if __name__ == "__main__":
    app()
