"""Healing a narrowed checkpoint: what can be asked for, and the door to it.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dotexport.healing.distil import heal, take_part
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.families import is_buffer
from dotexport.models.fused import as_read
from dotexport.narrowing.closed_form import ClosedForm
from dotexport.processes.processes import ALONE, Processes
from dotexport.storage.workspace import Workspace

Progress = Callable[[str, int, int], None]

STEP = "distillation"  # its name in a workspace


def heal_into(
    hf: Path,
    source: Checkpoint,
    closed: ClosedForm,
    text: HealingText,
    options: HealOptions,
    new_writer: Callable[[], CheckpointWriter],
    workspace: Workspace,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Distil the narrowed checkpoint in `hf` from its original, in place; returns the report.

    Args:
        new_writer: opens `hf` for writing, when all that is read from it has been read.
        processes: the first of those that share the work; the others follow it.
    """
    workspace.given({"healing": text.digests()})
    kept = workspace.load(STEP)
    student = Checkpoint.open(hf)
    asked = (student, source, closed.E_DK, text, options)
    processes.tell(take_part, *asked, closed.behind)
    healed = heal(
        *asked,
        behind=closed.behind,
        device=device,
        progress=progress,
        workspace=workspace,
        save=lambda tensors, course: workspace.save(STEP, course, tensors),
        saved=kept,
        processes=processes,
    )
    # Copies: what is mapped from the files is gone once they are opened for writing.
    buffers = {n: student.tensor(n).clone() for n in student.specs if is_buffer(n)}
    writer = new_writer()
    for name, tensor in (*buffers.items(), *as_read(student, healed.tensors)):
        writer.write(name, tensor)
    writer.finish()
    return healed.report | {"options": asdict(options)}
