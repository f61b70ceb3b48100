"""Tables of the core: what must change nothing, memory by depth, the demo.

python -m dotexport.bench core exactness
python -m dotexport.bench core memory
python -m dotexport.bench core demo
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
from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.loading import load_float32
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.outputs import summary
from dotexport.sizes.budget import plan

from ..stand_in import write_stand_in
from .result_files import CALIBRATION, RESULTS, Out, save, stories

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


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
        "sign of up turned, then left out by OBS, which gives their twins their share; against "
        "the model with the copies.",
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
    command = [sys.executable, "-m", "dotexport", "demo", "--json", "-o"]
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
    fitted = CalibrationText(token_windows(source.folder, text))
    run = prepare(source, decided, out.parent, fitted, NarrowOptions(refit=False))
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
