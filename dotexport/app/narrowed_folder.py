"""OUT/hf of the shrink verb: the closed form, and healing behind it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.carrying import carry
from dotexport.axes.plan import Plan
from dotexport.healing.heal import heal_into
from dotexport.healing.healing_text import healing_text
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.rope import in_all_words
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.basis import whole
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.closed_form import ClosedForm
from dotexport.narrowing.judging import Cost
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.prepare import prepare, settled, take_part, tensor_specs
from dotexport.processes.processes import Processes
from dotexport.storage.files import write_json
from dotexport.storage.workspace import Workspace
from dotexport.vocabulary.trimming import Trimmed, check_rows

logger = logging.getLogger(__name__)


def write_narrowed(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    text: CalibrationText,
    read: TextOptions,
    options: ShrinkOptions,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
    processes: Processes,
) -> tuple[ClosedForm, dict[str, Any] | None]:
    """Write FOLDER/hf: the closed form, and healing where that was asked for."""
    alone = decided.vocabulary_alone
    decided = decided.on_kept_tokens
    if not alone:
        _warn_if_thin(text, decided)
    healing = None
    if options.heal is not None:  # refuses what cannot be, before hours of narrowing
        options.heal.settled(text.length, processes.size)
        healing = healing_text(text, source.folder, read, options.heal)
    if alone and isinstance(source, Trimmed):
        closed = _copied(source, decided, folder, options)
    else:
        closed = _closed_form(
            *(source, decided, folder, text, options, device, workspace, progress),
            processes,
        )
    if healing is None or options.heal is None:
        return closed, None
    writer = partial(
        CheckpointWriter,
        folder / "hf",
        tensor_specs(*((source, decided) if alone else carry(source, decided))),
        max_shard_bytes=options.max_shard_bytes,
    )
    report = heal_into(
        *(
            folder / "hf",
            source,
            closed,
            healing,
            options.heal,
            writer,
            workspace,
            device,
            progress,
        ),
        processes,
    )
    return closed, report


def _copied(source: Trimmed, decided: Plan, folder: Path, options: ShrinkOptions) -> ClosedForm:
    """The original's tensors without the rows that left, as they are stored."""
    hf = folder / "hf"
    hf.mkdir()
    write_json(hf / "config.json", in_all_words(source.config))
    specs = tensor_specs(source, decided)
    writer = CheckpointWriter(hf, specs, max_shard_bytes=options.max_shard_bytes)
    for name in specs:
        writer.write(name, source.tensor(name))
    writer.finish()
    check_rows(Checkpoint.open(hf), source)
    width = decided.before.spaces["residual"]
    basis, behind = whole(width).as_dict(), decided.answered_layers
    costs = (Cost(kl=0.0, perplexity_ratio=1.0),)
    return ClosedForm(torch.eye(width).double(), basis, costs, [], "cpu", behind)


def _closed_form(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    text: CalibrationText,
    options: ShrinkOptions,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
    processes: Processes,
) -> ClosedForm:
    (folder / "hf").mkdir()
    run = prepare(
        source,
        decided,
        folder,
        text,
        options.narrow,
        device=device,
        max_shard_bytes=options.max_shard_bytes,
        progress=progress,
        workspace=workspace,
        processes=processes,
    )
    asked = settled(options.narrow, source, device)
    processes.tell(take_part, source, decided, text, asked)
    basis = run.run()
    run.writer.finish()
    E_DK = torch.from_numpy(basis.matrix_DK) * run.original.family.stream_gain(run.scale)
    where = str(run.streams.device)
    behind = decided.answered_layers
    return ClosedForm(E_DK, basis.as_dict(), tuple(run.costs), run.records, where, behind)


def _warn_if_thin(text: CalibrationText, decided: Plan) -> None:
    """Say when there is less text than a least-squares problem of this size asks for."""
    # Readers see the whole stream; a writer is fitted on the neurons that stay, that of an expert
    # on its share of the tokens.
    widest = max(decided.before.spaces["residual"], round(decided.after.fitted))
    tokens = len(text) * text.length
    if len(text) < 2 or tokens < 4 * widest:
        logger.warning(
            "only %d windows with %d tokens of calibration text for layers up to %d wide; "
            "more text or --samples makes a better model",
            len(text),
            tokens,
            widest,
        )
