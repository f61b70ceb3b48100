"""A second text, of another kind than the first: what serves one kind alone serves nobody."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from dotexport.errors import CalibrationError
from dotexport.generation.own_text import LONGEST, Progress, write_own_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.memory import fits
from dotexport.models.text_options import SELF, TextOptions, parts_of
from dotexport.models.text_windows import window_length
from dotexport.storage.workspace import Workspace

logger = logging.getLogger(__name__)

NONE = "none"
SEED = 1 << 16  # of own text that judges: it is none of that which was calibrated on
SHORTEST = 64  # slots of its rows: no more than the text needs
STEP = "second-text"  # its name in a workspace


def is_other(other: str, source: str) -> bool:
    """Whether `--other` names text beside this source, and no part of it."""
    named = {part.source for part in parts_of(other)} if other != NONE else set()
    return bool(named) and not named & {part.source for part in parts_of(source)}


def second_text(
    original: Checkpoint,
    text: TextOptions,
    other: str,
    file: Path,
    *,
    samples: int,
    seqlen: int,
    device: torch.device,
    seed: int = SEED,
    workspace: Workspace | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> TextOptions | None:
    """What `--other` names beside `--text` or `--calib`; None: nothing, or a part of that text.

    Args:
        other: a source, or NONE.
        file: takes what the original samples, where that is asked for.
        samples, seqlen: windows and their tokens, at most.
    """
    if not is_other(other, text.source):
        return None
    length = min(window_length(original.folder, text), seqlen)
    found = replace(
        text, source=other, samples=samples, seqlen=length, skip=0, every=None, own=None
    )
    if SELF not in {part.source for part in parts_of(other)}:
        return found
    if not fits(2 * original.num_parameters, device):  # sampling holds it in 16 bits
        logger.warning(
            "there is no second text: %s does not fit into memory, as sampling needs it to; "
            "name one with --other",
            original.folder,
        )
        return None
    try:
        return write_own_text(
            original,
            found,
            samples,
            file,
            seed=seed,
            device=device,
            workspace=workspace,
            progress=progress,
            step=STEP,
            longest=max(SHORTEST, min(LONGEST, samples * length // 4)),
        )[0]
    except CalibrationError as error:
        logger.warning("there is no second text: %s", error)
        return None
