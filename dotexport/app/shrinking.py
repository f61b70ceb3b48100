"""The shrink verb: a model folder goes in, OUT/hf of the same stock class comes out."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dotexport.app.narrowed_folder import write_narrowed
from dotexport.app.opening import check_apart, check_tensors, open_source
from dotexport.app.rehearsing import measures
from dotexport.app.resuming import decided_once, steps_of, workspace_of
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrink_record import OWN_TEXT, SECOND_TEXT, Shrunk, describe, sha256_of
from dotexport.axes.plan import Plan, SizeOptions, read_model
from dotexport.errors import UsageError
from dotexport.generation.own_text import write_own_text
from dotexport.generation.second_text import is_other, second_text
from dotexport.healing.compiling import check_compiler
from dotexport.models.checkpoint import Checkpoint, stored_config
from dotexport.models.finding import find_model
from dotexport.models.layers import Stock
from dotexport.models.origin import describe_source
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import spread, token_windows
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.depth import Depths
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.prepare import (
    dtype_of_passes,
    pick_device,
)
from dotexport.narrowing.sinks import sinks
from dotexport.processes.processes import ALONE, Processes
from dotexport.sizes.allocation import allocate
from dotexport.sizes.beside_towers import beside_towers
from dotexport.sizes.budget import plan, shortfall
from dotexport.sizes.frozen import frozen
from dotexport.sizes.full_rows import newly_torn
from dotexport.storage import manifest
from dotexport.storage.files import write_json, write_text
from dotexport.storage.output import new_folder
from dotexport.storage.workspace import Workspace, settle_others
from dotexport.vocabulary.expecting import expected
from dotexport.vocabulary.trimming import Trimmed, trim

RECIPE = "recipe.yaml"

logger = logging.getLogger(__name__)


def shrink(
    model: str | Path,
    out: Path,
    options: ShrinkOptions,
    *,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    recipe: str = "",
    progress: Progress = lambda stage, done, total: None,
    accept: Callable[[Plan], bool] = lambda plan: True,
    processes: Processes = ALONE,
) -> Shrunk:
    """Narrow a model and write OUT/hf, OUT/dotexport.json, OUT/README.md and OUT/reports.

    Two runs with the same inputs, options and machine give the same bytes in OUT/hf. One that was
    stopped goes on where it was (storage/workspace.py).

    Args:
        resume: False discards what was left unfinished for `out`, by this command or another.
        recipe: what OUT/recipe.yaml will say; it appears with the rest, so that a run which is
            killed right afterwards is known again.
        accept: what else sizes that are measured must satisfy, as targets do.
        processes: the first of those that share the text; the others follow it.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, SizeError, UsageError.
    """
    started = time.perf_counter()
    original = open_source(find_model(str(model)))
    sizes = beside_towers(stored_config(original.folder), options.sizes)
    options = replace(options, sizes=sizes)
    check_tensors(original, *read_model(original.config))
    Stock.of(original.config, torch.device("cpu"))  # refuses what transformers cannot build
    if not options.vocabulary.asked:
        plan(original.config, options.sizes)  # refuses what cannot be, before anything is made
    check_apart(original.folder, out)
    with (
        new_folder(out, overwrite=overwrite) as folder,
        tempfile.TemporaryDirectory() as scratch,
        ExitStack() as stack,
    ):
        where = pick_device(device)
        if options.heal is not None and options.heal.compiled:
            check_compiler(where)
        passes = dtype_of_passes(original, options.narrow, where)
        described = describe_source(original)
        workspace = workspace_of(out, original, described, options, where, passes, processes.size)
        settle_others(out, workspace, discard=overwrite or not resume)
        if not resume:
            workspace.remove()
        stack.enter_context(workspace.told())
        trained = (options.heal and options.heal.samples) or 0
        text, own = write_own_text(
            original,
            options.text,
            max(options.text.samples, trained),
            folder / OWN_TEXT,
            seed=options.narrow.seed,
            device=where,
            workspace=workspace,
            progress=progress,
        )
        count = options.text.samples
        if is_other(options.other, text.source):  # half of the windows will be of it
            count -= count // 2
        text = spread(original.folder, text, max(count, trained))
        options = replace(options, text=replace(options.text, every=text.every))
        source, config, sizes = _on_kept_tokens(
            original, options, text, Path(scratch), where, passes, workspace, progress
        )
        decided = plan(config, sizes)
        fitted = _calibration_text(
            *(original, source, text, decided, options, folder, where, workspace, progress),
            processes,
        )
        depths = Depths(source, fitted, where, passes, progress, workspace=workspace)
        allocation = None
        if options.allocate == "measured" and sizes.budgeted and not decided.vocabulary_alone:
            first, closer, healed = measures(
                source, fitted, options, depths, folder, workspace, processes
            )
            allocation = allocate(
                config,
                sizes,
                first,
                progress,
                courses=depths.courses,
                accept=accept,
                closer=closer,
                healed=healed,
            )
            decided = allocation.plan
        if sizes.latency is not None:
            decided = decided_once(decided, workspace)
        cut_short = (shortfall(config, sizes, decided), *frozen(config, sizes, decided, {}))
        for sentence in (*cut_short, *newly_torn(decided)):
            if sentence:
                logger.warning("%s", sentence)
        decided = depths.settled(decided)
        steps_of(decided, workspace)
        closed, healing = write_narrowed(
            *(source, decided, folder, fitted, text, options, where, workspace),
            *(progress, processes),
        )
        _copy_companions(source, folder / "hf")
        seconds = time.perf_counter() - started
        shrunk = Shrunk(
            out,
            decided,
            closed.basis,
            closed.costs,
            seconds,
            len(fitted),
            closed.sites,
            allocation,
            healing,
            {
                **source.report,
                "alone": decided.vocabulary_alone,
                "exact": decided.vocabulary_alone and not (healing or {}).get("best_step"),
            }
            if isinstance(source, Trimmed)
            else None,
        )
        if recipe:
            write_text(folder / RECIPE, recipe)
            manifest.update(folder, recipe=hashlib.sha256(recipe.encode()).hexdigest())
        describe(folder, described, options, shrunk, fitted, own, closed, passes)
        if isinstance(source, Trimmed):
            write_json(folder / "reports" / "vocabulary.json", {"original_ids": source.kept.ids})
    workspace.remove()
    return shrunk


def _calibration_text(
    original: Checkpoint,
    source: Checkpoint,
    text: TextOptions,
    decided: Plan,
    options: ShrinkOptions,
    folder: Path,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
    processes: Processes,
) -> CalibrationText:
    """Windows of the text, and of a second one, with the tokens that attention rests on.

    Raises:
        UsageError: there is no window for some process.
    """
    progress("reading the calibration text", 0, 1)
    windows_NL = token_windows(source.folder, text)
    workspace.given({"windows": sha256_of(windows_NL)})
    if decided.vocabulary_alone and options.heal is None:  # it is counted, and nothing is fitted
        _check_share(len(windows_NL), processes)
        return CalibrationText(windows_NL)
    other_NL = _other_windows(
        original, source, text, windows_NL, options, folder, device, workspace, progress
    )
    if other_NL is not None:
        windows_NL = windows_NL[: options.text.samples - len(other_NL)]
    found = CalibrationText(windows_NL, other_NL)
    _check_share(len(found), processes)
    progress("looking for tokens that attention rests on", 0, 1)
    resting = sinks(source, windows_NL)
    workspace.given({"sinks": resting})
    return found.sown(resting, options.narrow.seed)


def _other_windows(
    original: Checkpoint,
    source: Checkpoint,
    text: TextOptions,
    windows_NL: torch.Tensor,
    options: ShrinkOptions,
    folder: Path,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
) -> torch.Tensor | None:
    """Windows of the second text: half of all, and no more than the first has."""
    count, length = windows_NL.shape
    half = min(options.text.samples // 2, count)
    if half == 0:
        return None
    found = second_text(
        original,
        text,
        options.other,
        folder / SECOND_TEXT,
        samples=half,
        seqlen=length,
        seed=options.narrow.seed,
        device=device,
        workspace=workspace,
        progress=progress,
    )
    if found is None:
        return None
    other_NL = token_windows(source.folder, spread(source.folder, found, half))
    workspace.given({"second windows": sha256_of(other_NL)})
    return other_NL


def _on_kept_tokens(
    original: Checkpoint,
    options: ShrinkOptions,
    text: TextOptions,
    scratch: Path,
    device: torch.device,
    passes: torch.dtype,
    workspace: Workspace,
    progress: Progress,
) -> tuple[Checkpoint, Mapping[str, Any], SizeOptions]:
    """What is narrowed, and a config and sizes for its plan: a budget is a share of all rows."""
    if not options.vocabulary.asked:
        return original, original.config, options.sizes
    expect = partial(expected, original, dtype=passes, device=device, progress=progress)
    source = trim(
        *(original, options.vocabulary, text.source, scratch, progress, text.own, workspace),
        expect=expect,
    )
    sizes = replace(options.sizes, vocab_size=source.config["vocab_size"])
    return source, {**source.config, "vocab_size": original.config["vocab_size"]}, sizes


def _check_share(windows: int, processes: Processes) -> None:
    if windows < processes.size:
        raise UsageError(
            f"{processes.size} processes cannot share {windows} windows of calibration text; give "
            "more --samples (or more text), or start no more processes than there are windows"
        )


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    for file in source.companions():
        shutil.copyfile(file, folder / file.name)
