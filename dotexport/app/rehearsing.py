"""What sizes within a budget are judged by: short narrowings, and what is left behind a short
distillation where a long one is to follow.

What heals best is not what costs least before: a cut in depth may be behind one in width, and ahead
of it a few hundred thousand tokens later. So where distillation was asked for, the plans that are
measured together are narrowed and distilled in short.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dotexport.app.resuming import CLOSER_CUTS, CUTS, HEALED_CUTS, Measure, remembered
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import Plan
from dotexport.healing.distil import heal
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText, split
from dotexport.models.checkpoint import Checkpoint
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.depth import Depths
from dotexport.narrowing.prepare import prepare, rehearsals, rehearsed_tokens
from dotexport.narrowing.run import CLOSER, REHEARSED_LENGTH
from dotexport.processes.processes import ALONE, Processes
from dotexport.storage.workspace import Workspace


def measures(
    source: Checkpoint,
    text: CalibrationText,
    options: ShrinkOptions,
    depths: Depths,
    folder: Path,
    workspace: Workspace,
    processes: Processes = ALONE,
) -> tuple[Measure, Measure, Measure | None]:
    """For cuts of one axis; for the last few sizes, with more text; and for these behind a short
    distillation, where there is to be a long one. Every figure is kept in the workspace.

    Args:
        depths: which layers stay where some leave.
        folder: takes what is distilled, meanwhile.
    """

    def kept(measure: Measure, step: str) -> Measure:
        return remembered(lambda p: measure(depths.settled(p).on_kept_tokens), workspace, step)

    rehearse = rehearsals(source, text, options.narrow, depths.device, processes=processes)
    first, closer = kept(rehearse, CUTS), kept(partial(rehearse, times=CLOSER), CLOSER_CUTS)
    trial = options.heal.trial(text.length) if options.heal else None
    if trial is None:
        return first, closer, None
    asked = (source, text, options, trial, depths.device, folder)
    return first, closer, kept(healed_rehearsals(*asked), HEALED_CUTS)


def healed_rehearsals(
    source: Checkpoint,
    text: CalibrationText,
    options: ShrinkOptions,
    trial: HealOptions,
    device: torch.device,
    scratch: Path,
) -> Measure:
    """A function from a plan to its held-out divergence behind a short distillation, nats per
    token; what is narrowed for it lies in `scratch` meanwhile.

    Args:
        text: both kinds are fitted and judged.
        trial: that distillation (HealOptions.trial).
    """
    splits = [split(kind_NL) for kind_NL in text.last(REHEARSED_LENGTH).kinds]
    train_NL, held_NL = (torch.cat(parts) for parts in zip(*splits, strict=True))
    healing = HealingText(train_NL, held_NL if len(held_NL) else train_NL)
    tokens_of_each = train_NL.shape[1] * len(splits)
    cheap = replace(options.narrow, mlp="obs", heads="obs", local=None)

    def measure(planned: Plan) -> float:
        count = -(-rehearsed_tokens(planned.before.spaces["residual"]) // tokens_of_each)
        fitted = text.of([part_NL[: max(2, count)] for part_NL, _ in splits])
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".rehearsal-") as place:
            folder = Path(place)
            (folder / "hf").mkdir()
            run = prepare(
                source,
                planned,
                folder,
                fitted,
                cheap,
                device=device,
                max_shard_bytes=options.max_shard_bytes,
            )
            basis = run.run()
            run.writer.finish()
            healed = heal(
                Checkpoint.open(folder / "hf"),
                source,
                torch.from_numpy(basis.matrix_DK),
                healing,
                trial,
                behind=planned.answered_layers,
                device=device,
                workspace=Workspace(),
            )
        divergence: float = healed.report["kl"][1]
        return divergence

    return measure
