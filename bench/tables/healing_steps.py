"""What a step of distillation takes, beside one that is written plainly: autocast, the original in
float32, logits whole.

python -m dotexport.bench healing --model FOLDER
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from dotexport.axes.plan import read_model
from dotexport.bench.tables.result_files import RESULTS, Out, save
from dotexport.healing.distil import NOWHERE, Healing
from dotexport.healing.distil_loss import recorded, stream_distance
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from dotexport.models.loading import load_float32
from dotexport.storage.files import write_json

MLP = "mlp."

app = typer.Typer()

Step = Callable[[], object]


@app.command()
def healing(
    model: Annotated[Path, typer.Option(help="Folder of a model, or a GGUF file's unpacked one.")],
    share: Annotated[
        float, typer.Option(help="Of MLP neurons that the narrowed model has.")
    ] = 0.65,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    steps: Annotated[int, typer.Option(help="That are measured, in each turn.")] = 2,
    turns: Annotated[int, typer.Option(help="Of each kind of step.")] = 2,
    out: Out = RESULTS,
) -> None:
    """CPU seconds and peak memory of a step, by turns, in a fresh process each, on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        narrow = Path(scratch) / "narrow"
        _first_neurons(Checkpoint.open(model), narrow, share)
        kinds = ("plain", "now", "now, without streams")
        taken = [
            (kind, *_in_a_process(kind, model, narrow, batch, length, steps))
            for _ in range(turns)
            for kind in kinds
        ]
    rows = []
    for kind in kinds:
        seconds = min(seconds for name, seconds, _ in taken if name == kind)
        rows.append(
            {
                "step": kind,
                "CPU seconds": seconds,
                "tokens per CPU second": batch * length / seconds,
                "peak memory, MB": max(peak for name, _, peak in taken if name == kind),
            }
        )
    save(
        out / "healing",
        "A step of distillation",
        f"{model.name} and the first {share:.0%} of each MLP's neurons of it (weights do not "
        f"matter), {batch} windows of {length} random tokens; one thread, the least of {turns} "
        f"turns of {steps} steps behind a first one, CPU time of the process, its peak memory. "
        "`plain`: bfloat16 autocast, the original in float32, logits whole, five windows at "
        "once. `without streams`: KL alone.",
        rows,
    )


def _in_a_process(kind: str, *asked: Any) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (kind, *asked))


def _measured(
    kind: str, model: Path, narrow: Path, batch: int, length: int, steps: int
) -> tuple[float, float]:
    """CPU seconds of a step, and MB of the process at its peak."""
    torch.set_num_threads(1)
    student, source = Checkpoint.open(narrow), Checkpoint.open(model)
    random = torch.Generator().manual_seed(0)
    windows_NL = torch.randint(source.config["vocab_size"], (batch + 1, length), generator=random)
    options = HealOptions(steps=1000, batch=batch, precision="bf16")
    if kind == "now, without streams":
        options = replace(options, hidden_weight=0.0)
    if kind == "plain":
        take = _plain(student, source, windows_NL[1:], options)
    else:
        take = _now(student, source, windows_NL, options)
    take()
    began = time.process_time()
    for _ in range(steps):
        take()
    seconds = (time.process_time() - began) / steps
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _now(student: Checkpoint, source: Checkpoint, windows_NL: Tensor, options: HealOptions) -> Step:
    text = HealingText(windows_NL[1:], windows_NL[:1])
    E_DK, cpu = torch.eye(source.config["hidden_size"]), torch.device("cpu")
    return Healing.begin(student, source, E_DK, text, options, cpu, None, NOWHERE).advance


def _plain(
    student: Checkpoint, source: Checkpoint, tokens_NL: Tensor, options: HealOptions
) -> Step:
    teacher: Any = load_float32(source).requires_grad_(False)
    model: Any = load_float32(student)
    E_DK = torch.eye(source.config["hidden_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def said(of: Any, tokens_BL: Tensor) -> tuple[Tensor, list[Tensor]]:
        streams: list[Tensor] = []
        with recorded(of, streams):
            logits_CV = of(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1)
        return log_softmax(logits_CV.float(), -1), streams

    def step() -> None:
        for tokens_BL in torch.split(tokens_NL, 5):
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    theirs_CV, their_streams = said(teacher, tokens_BL)
                ours_CV, our_streams = said(model, tokens_BL)
                loss = kl_div(ours_CV, theirs_CV, reduction="batchmean", log_target=True)
                loss = loss + options.hidden_weight * stream_distance(
                    our_streams, [x.float() for x in their_streams], E_DK
                )
            (loss * (len(tokens_BL) / len(tokens_NL))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _first_neurons(source: Checkpoint, folder: Path, share: float) -> None:
    """The model with the first of its MLP's neurons, which is as fast as any choice of them."""
    before = read_model(source.config)[1].intermediate_size
    after = round(share * before / 32) * 32
    specs, cut = {}, {}
    for name, spec in source.specs.items():
        axes = [axis for axis, size in enumerate(spec.shape) if MLP in name and size == before]
        cut[name] = axes
        shape = tuple(after if axis in axes else size for axis, size in enumerate(spec.shape))
        specs[name] = TensorSpec(shape, torch.bfloat16)
    folder.mkdir()
    writer = CheckpointWriter(folder, specs)
    for name in specs:
        tensor = source.tensor(name)
        for axis in cut[name]:
            tensor = tensor.narrow(axis, 0, after)
        writer.write(name, tensor.contiguous().bfloat16())
    writer.finish()
    write_json(folder / "config.json", {**source.config, "intermediate_size": after})
