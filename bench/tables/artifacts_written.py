"""The table of docs/results/targets.md: every target and precision on the embedded model.

    python -m dotexport.bench targets

Narrows the embedded model to 0.7x, writes each artifact, holds it against torch, and says what it
takes and how far it is off. Targets whose runtime is missing here are left out, and named.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from dotexport import embedded
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.errors import RuntimeMissingError
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import Target, find_target, lacking, target_names
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.storage.output import folder_bytes

from .result_files import RESULTS, save

Row = dict[str, Any]
CALIBRATION = TextOptions(source="embedded:calibration", samples=16, seqlen=256)
PARAMS = "0.7x"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table.")] = RESULTS,
    target: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
) -> None:
    """Parity, bytes and time to write, of every target in every precision."""
    asked = target or target_names()
    with tempfile.TemporaryDirectory() as scratch:
        shrunk = Path(scratch) / "out"
        shrink(
            embedded.MODEL_DIR,
            shrunk,
            ShrinkOptions(sizes=SizeOptions(params=PARAMS), text=CALIBRATION),
        )
        checkpoint = Checkpoint.open(shrunk / "hf")
        reference = compute_reference(checkpoint)
        ready, missing = _usable(asked)
        rows = [
            _row(one, precision, checkpoint, reference, Path(scratch) / f"{one.name}-{precision}")
            for one in ready
            for precision in one.precisions
            if not one.problems(checkpoint, precision)
        ]
        _save(out / "targets", rows, missing, checkpoint)


def _usable(names: list[str]) -> tuple[list[Target], list[str]]:
    ready, missing = [], []
    for name in names:
        try:
            target = find_target(name)
            if target.missing() or lacking(target):
                missing.append(name)
            else:
                ready.append(target)
        except RuntimeMissingError:
            missing.append(name)
    return ready, missing


def _processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _row(
    target: Target, precision: str, checkpoint: Checkpoint, reference: Reference, folder: Path
) -> Row:
    folder.mkdir()
    started = _processor_seconds()
    target.write(checkpoint, folder, precision)
    seconds = _processor_seconds() - started
    parity = check(target, precision, folder, reference, artifact=folder.name)
    relative = max(phase.relative for phase in parity.phases.values())
    row = {
        "target": target.name,
        "precision": precision,
        "worst logit": parity.max_abs,
        "relative error": relative,
        "KL, nats": parity.kl,
        "top-1": parity.top1,
        "verdict": "passed" if parity.passed else "; ".join(parity.problems),
        "MB": folder_bytes(folder) / 1e6,
        "bytes per parameter": folder_bytes(folder) / checkpoint.num_parameters,
        "seconds to write": seconds,
    }
    typer.echo(json.dumps(row), err=True)
    return row


def _save(file: Path, rows: list[Row], missing: list[str], checkpoint: Checkpoint) -> None:
    protocol = (
        f"The embedded model narrowed to {PARAMS} ({checkpoint.num_parameters:,} parameters, "
        f"hidden_size {checkpoint.config['hidden_size']}), each artifact held against the narrowed "
        "torch model in float32: prefill, cached decode, both again in one right-padded batch; "
        "the worst of the four. MB is the whole folder, tokenizer included. Seconds are processor "
        "time, of the model builder's own process too."
    )
    if missing:
        protocol += f" Cannot run here: {', '.join(missing)}."
    save(file, "Targets and precisions", protocol, rows)
