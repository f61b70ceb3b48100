"""Healing a narrowed checkpoint: what can be asked for, and the door to it.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dotexport.healing.distil import heal
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.healing.resume import ClosedForm, Workspace
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.origin import describe_source
from dotexport.version import __version__

Progress = Callable[[str, int, int], None]


def workspace_of(
    out: Path,
    source: Checkpoint,
    options: Mapping[str, Any],
    text: HealingText,
    device: torch.device,
) -> Workspace:
    """Where this command keeps what it can be resumed from; any other input gives another place."""
    parts = (text.train_NL, text.held_NL)
    identity = {
        "version": __version__,
        "source": describe_source(source),
        "options": json.loads(json.dumps(options)),
        "windows": [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts],
        "device": str(device),
    }
    return Workspace.of(out, identity)


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
) -> dict[str, Any]:
    """Distil the narrowed checkpoint in `hf` from its original, in place; returns the report.

    Args:
        new_writer: opens `hf` for writing, when all that is read from it has been read.
    """
    try:
        healed = heal(
            Checkpoint.open(hf),
            source,
            closed.E_DK,
            text,
            options,
            behind=closed.behind,
            device=device,
            progress=progress,
            save=workspace.save,
            saved=workspace.saved(),
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"the closed form and the last evaluated step are kept in {workspace.folder}; run the "
            "same command again and healing goes on from there"
        ) from stop
    writer = new_writer()
    for name, tensor in healed.tensors.items():
        writer.write(name, tensor)
    writer.finish()
    return healed.report | {"options": asdict(options)}
