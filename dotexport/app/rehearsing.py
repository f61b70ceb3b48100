"""Sizes judged as they will be used: behind a short distillation, where a long one is to follow.

What heals best is not what costs least before: a cut in depth may be behind one in width, and ahead
of it a few hundred thousand tokens later. So where distillation was asked for, the plans that are
measured together are narrowed and distilled in short.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import Plan
from dotexport.healing.distil import heal
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText, split
from dotexport.models.checkpoint import Checkpoint
from dotexport.narrowing.prepare import prepare, rehearsed_tokens
from dotexport.narrowing.run import REHEARSED_LENGTH
from dotexport.storage.workspace import Workspace


def healed_rehearsals(
    source: Checkpoint,
    windows_NL: Tensor,
    options: ShrinkOptions,
    trial: HealOptions,
    device: torch.device,
    scratch: Path,
    other_NL: Tensor | None = None,
) -> Callable[[Plan], float]:
    """A function from a plan to its held-out divergence behind a short distillation, nats per
    token; what is narrowed for it lies in `scratch` meanwhile.

    Args:
        trial: that distillation (HealOptions.trial).
        other_NL: windows of another kind of text; both kinds are fitted and judged.
    """
    kinds = [windows_NL] if other_NL is None else [windows_NL, other_NL]
    splits = [split(text_NL[:, :REHEARSED_LENGTH], options.narrow.seed) for text_NL in kinds]
    train_NL, held_NL = (torch.cat(parts) for parts in zip(*splits, strict=True))
    text = HealingText(train_NL, held_NL if len(held_NL) else train_NL)
    tokens_of_each = train_NL.shape[1] * len(kinds)
    cheap = replace(options.narrow, mlp="obs", heads="obs", local=None)

    def measure(planned: Plan) -> float:
        count = -(-rehearsed_tokens(planned.before.spaces["residual"]) // tokens_of_each)
        fitted = [part_NL[: max(2, count)] for part_NL, _ in splits]
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".rehearsal-") as place:
            folder = Path(place)
            (folder / "hf").mkdir()
            run = prepare(
                source,
                planned,
                folder,
                fitted[0],
                cheap,
                device=device,
                max_shard_bytes=options.max_shard_bytes,
                other_NL=fitted[1] if fitted[1:] else None,
            )
            basis = run.run()
            run.writer.finish()
            healed = heal(
                Checkpoint.open(folder / "hf"),
                source,
                torch.from_numpy(basis.matrix_DK),
                text,
                trial,
                behind=planned.answered_layers,
                device=device,
                workspace=Workspace(),
            )
        divergence: float = healed.report["kl"][1]
        return divergence

    return measure
