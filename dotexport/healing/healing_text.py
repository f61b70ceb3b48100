"""The text that healing trains on, and what is held out of it.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dotexport.errors import UsageError
from dotexport.healing.heal_options import HealOptions
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.streams import held_out_windows


@dataclass(frozen=True)
class HealingText:
    """Windows to train on, and those that choose the step."""

    train_NL: Tensor
    held_NL: Tensor

    def digests(self) -> list[str]:
        parts = (self.train_NL, self.held_NL)
        return [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts]


def healing_text(
    windows_NL: Tensor, model: Path, text: TextOptions, options: HealOptions, *, seed: int
) -> HealingText:
    """The split that narrowing used too, and more windows of the same text where asked for.

    Raises:
        UsageError: fewer windows than calibration has.
    """
    if options.samples is not None and options.samples < len(windows_NL):
        raise UsageError(
            f"--heal-samples {options.samples} is less than the {len(windows_NL)} windows of "
            "calibration, which healing trains on too; give more, or fewer --samples"
        )
    held = held_out_windows(len(windows_NL), seed)
    train_NL = windows_NL[[n for n in range(len(windows_NL)) if n not in held]]
    # A single window is both: nothing can be held out of it.
    held_NL = windows_NL[sorted(held)] if held else windows_NL
    if options.samples is not None and options.samples > len(windows_NL):
        everything_NL = token_windows(model, replace(text, samples=options.samples))
        train_NL = torch.cat([train_NL, everything_NL[len(windows_NL) :]])
    return HealingText(train_NL, held_NL)
