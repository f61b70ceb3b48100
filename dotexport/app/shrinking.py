"""The shrink verb: a model folder goes in, OUT/hf of the same stock class comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dotexport.app.opening import check_apart, check_tensors, open_source
from dotexport.app.rehearsing import measures
from dotexport.app.resuming import decided_once, steps_of, workspace_of
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.carrying import carry
from dotexport.axes.plan import Plan, SizeOptions, read_model
from dotexport.errors import UsageError
from dotexport.generation.own_text import write_own_text
from dotexport.generation.second_text import second_text
from dotexport.healing.compiling import check_compiler
from dotexport.healing.heal import heal_into
from dotexport.healing.healing_text import healing_text
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter
from dotexport.models.finding import find_model
from dotexport.models.layers import Stock
from dotexport.models.origin import describe_source
from dotexport.models.rope import in_all_words
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import whole
from dotexport.narrowing.closed_form import ClosedForm
from dotexport.narrowing.depth import Depths
from dotexport.narrowing.judging import Cost
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.prepare import (
    dtype_of_passes,
    pick_device,
    prepare,
    settled,
    take_part,
    tensor_specs,
)
from dotexport.outputs import card
from dotexport.processes.processes import ALONE, Processes
from dotexport.sizes.allocation import Allocation, allocate
from dotexport.sizes.budget import plan, shortfall
from dotexport.sizes.frozen import frozen
from dotexport.storage import manifest
from dotexport.storage.files import write_json, write_text
from dotexport.storage.output import new_folder
from dotexport.storage.workspace import Workspace, settle_others
from dotexport.vocabulary.trimming import Trimmed, check_rows, trim

RECIPE = "recipe.yaml"
OWN_TEXT = "reports/self.jsonl"
SECOND_TEXT = "reports/second.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shrunk:
    """What shrink made.

    Attributes:
        costs: of the closed form on held-out calibration text, on the tokens that stay, and nothing
            where nothing but tokens left; then on text of another kind where there is.
        vocabulary: which tokens stay, and what the smaller tokenizer was held to.
    """

    out: Path
    plan: Plan
    basis: dict[str, Any]
    costs: tuple[Cost, ...]
    seconds: float
    num_windows: int
    sites: list[dict[str, Any]]
    allocation: Allocation | None = None
    healing: dict[str, Any] | None = None
    vocabulary: Mapping[str, Any] | None = None

    @property
    def divergence(self) -> float:
        """Of the closed form on held-out calibration text, nats per token."""
        return self.costs[0].kl

    def cost(self) -> dict[str, float]:
        """Against the original on held-out windows of the calibration text, healing included; of
        the closed form also on text of another kind."""
        if self.healing is None:
            return {
                f"{kind}{name}": value
                for kind, cost in zip(("", "other_"), self.costs, strict=False)
                for name, value in asdict(cost).items()
            }
        after, before = self.healing["perplexity"][1], self.healing["original_perplexity"]
        return {"kl": self.healing["kl"][1], "perplexity_ratio": after / before}

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "sizes": self.plan.as_dict(),
            "kept_layers": self.plan.kept_layers,
            "architecture": self.plan.architectures,
            "basis": self.basis,
            "held_out_kl": self.divergence,
            "held_out_perplexity_ratio": self.costs[0].perplexity_ratio,
            "other_kl": self.costs[1].kl if self.costs[1:] else None,
            "seconds": round(self.seconds, 2),
            "calibration_windows": self.num_windows,
            "sites": self.sites,
            **({"allocation": self.allocation.as_dict()} if self.allocation else {}),
            **({"healing": self.healing} if self.healing else {}),
            **({"vocabulary": self.vocabulary} if self.vocabulary else {}),
        }


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
        text, own = write_own_text(
            original,
            options.text,
            max(options.text.samples, (options.heal and options.heal.samples) or 0),
            folder / OWN_TEXT,
            seed=options.narrow.seed,
            device=where,
            workspace=workspace,
            progress=progress,
        )
        source, config, sizes = _on_kept_tokens(
            original, options, text, Path(scratch), workspace, progress
        )
        decided = plan(config, sizes)
        progress("reading the calibration text", 0, 1)
        windows_NL = token_windows(source.folder, text)
        workspace.given({"windows": _sha256(windows_NL)})
        allocation = None
        other_NL = None
        if not decided.vocabulary_alone:
            other_NL = _other_windows(
                original, source, text, windows_NL, options, folder, where, workspace, progress
            )
        if other_NL is not None:
            windows_NL = windows_NL[: options.text.samples - len(other_NL)]
        _check_share(windows_NL, other_NL, processes)
        depths = Depths(
            source,
            windows_NL,
            options.narrow.seed,
            where,
            passes,
            progress,
            workspace=workspace,
            other_NL=other_NL,
        )
        if options.allocate == "measured" and sizes.budgeted:
            first, closer, healed = measures(
                source, windows_NL, other_NL, options, depths, folder, workspace, processes
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
        for sentence in (shortfall(config, sizes, decided), *frozen(config, sizes, decided, {})):
            if sentence:
                logger.warning("%s", sentence)
        decided = depths.settled(decided)
        steps_of(decided, workspace)
        closed, healing = _narrowed(
            *(source, decided, folder, windows_NL, other_NL, text, options, where, workspace),
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
            len(windows_NL) + (0 if other_NL is None else len(other_NL)),
            closed.sites,
            allocation,
            healing,
            {**source.report, "exact": decided.vocabulary_alone}
            if isinstance(source, Trimmed)
            else None,
        )
        if recipe:
            write_text(folder / RECIPE, recipe)
            manifest.update(folder, recipe=hashlib.sha256(recipe.encode()).hexdigest())
        _describe(folder, described, options, shrunk, windows_NL, other_NL, own, closed, passes)
        if isinstance(source, Trimmed):
            write_json(folder / "reports" / "vocabulary.json", {"original_ids": source.kept.ids})
    workspace.remove()
    return shrunk


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
    other_NL = token_windows(source.folder, found)
    workspace.given({"second windows": _sha256(other_NL)})
    return other_NL


def _on_kept_tokens(
    original: Checkpoint,
    options: ShrinkOptions,
    text: TextOptions,
    scratch: Path,
    workspace: Workspace,
    progress: Progress,
) -> tuple[Checkpoint, Mapping[str, Any], SizeOptions]:
    """What is narrowed, and a config and sizes for its plan: a budget is a share of all rows."""
    if not options.vocabulary.asked:
        return original, original.config, options.sizes
    source = trim(original, options.vocabulary, text.source, scratch, progress, text.own, workspace)
    sizes = replace(options.sizes, vocab_size=source.config["vocab_size"])
    return source, {**source.config, "vocab_size": original.config["vocab_size"]}, sizes


def _narrowed(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    windows_NL: torch.Tensor,
    other_NL: torch.Tensor | None,
    read: TextOptions,
    options: ShrinkOptions,
    device: torch.device,
    workspace: Workspace,
    progress: Progress,
    processes: Processes,
) -> tuple[ClosedForm, dict[str, Any] | None]:
    """Write FOLDER/hf: the closed form, and healing where that was asked for."""
    if decided.vocabulary_alone and isinstance(source, Trimmed):
        if options.heal is not None:
            logger.warning("nothing is healed: only tokens leave, and every weight stays as it is")
        return _copied(source, decided.on_kept_tokens, folder, options), None
    decided = decided.on_kept_tokens
    _warn_if_thin([kind_NL for kind_NL in (windows_NL, other_NL) if kind_NL is not None], decided)
    text = None
    if options.heal is not None:  # refuses what cannot be, before hours of narrowing
        options.heal.settled(windows_NL.shape[1], processes.size)
        text = healing_text(
            windows_NL,
            source.folder,
            read,
            options.heal,
            seed=options.narrow.seed,
            other_NL=other_NL,
        )
    closed = _closed_form(
        *(source, decided, folder, windows_NL, other_NL, options, device, workspace, progress),
        processes,
    )
    if text is None or options.heal is None:
        return closed, None
    writer = partial(
        CheckpointWriter,
        folder / "hf",
        tensor_specs(*carry(source, decided)),
        max_shard_bytes=options.max_shard_bytes,
    )
    report = heal_into(
        *(folder / "hf", source, closed, text, options.heal, writer, workspace, device, progress),
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
    windows_NL: torch.Tensor,
    other_NL: torch.Tensor | None,
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
        windows_NL,
        options.narrow,
        device=device,
        max_shard_bytes=options.max_shard_bytes,
        progress=progress,
        workspace=workspace,
        other_NL=other_NL,
        processes=processes,
    )
    asked = settled(options.narrow, source, device)
    processes.tell(take_part, source, decided, windows_NL, other_NL, asked)
    basis = run.run()
    run.writer.finish()
    E_DK = torch.from_numpy(basis.matrix_DK) * run.original.family.stream_gain(run.scale)
    where = str(run.streams.device)
    behind = decided.answered_layers
    return ClosedForm(E_DK, basis.as_dict(), tuple(run.costs), run.records, where, behind)


def _check_share(
    windows_NL: torch.Tensor, other_NL: torch.Tensor | None, processes: Processes
) -> None:
    """Raises: UsageError: there is no window for some process."""
    count = len(windows_NL) + (0 if other_NL is None else len(other_NL))
    if count < processes.size:
        raise UsageError(
            f"{processes.size} processes cannot share {count} windows of calibration text; give "
            "more --samples (or more text), or start no more processes than there are windows"
        )


def _warn_if_thin(texts: Sequence[torch.Tensor], decided: Plan) -> None:
    """Say when there is less text than a least-squares problem of this size asks for."""
    # Readers see the whole stream; a writer is fitted on the neurons that stay, that of an expert
    # on its share of the tokens.
    widest = max(decided.before.spaces["residual"], round(decided.after.fitted))
    windows, tokens = sum(map(len, texts)), sum(windows_NL.numel() for windows_NL in texts)
    if windows < 2 or tokens < 4 * widest:
        logger.warning(
            "only %d windows with %d tokens of calibration text for layers up to %d wide; "
            "more text or --samples makes a better model",
            windows,
            tokens,
            widest,
        )


def _artifact(folder: Path) -> dict[str, Any]:
    """The stock checkpoint is an artifact too, of the target `hf`."""
    files = manifest.hash_files(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    stored = {"target": "hf", "precision": "as-stored", "bytes": num_bytes}
    return stored | {"files": files, "parity": None}


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    for file in source.companions():
        shutil.copyfile(file, folder / file.name)


def _describe(
    folder: Path,
    source: dict[str, Any],
    options: ShrinkOptions,
    shrunk: Shrunk,
    windows_NL: torch.Tensor,
    other_NL: torch.Tensor | None,
    own: Mapping[str, Any],
    closed: ClosedForm,
    passes: torch.dtype,
) -> None:
    recipe = json.loads(json.dumps(asdict(options)))
    manifest.update(
        folder,
        source=source,
        shrink=recipe | {"sha256": hashlib.sha256(json.dumps(recipe).encode()).hexdigest()},
        calibration={
            "source": options.text.source,
            "windows": len(windows_NL),
            "seqlen": windows_NL.shape[1],
            "sha256": _sha256(windows_NL),
            **({"own_text": {"file": OWN_TEXT, **own}} if own else {}),
            **({} if other_NL is None else {"other": _second(options.other, other_NL)}),
        },
        sizes=shrunk.plan.as_dict(),
        kept_layers=shrunk.plan.kept_layers,
        architecture=shrunk.plan.architectures,
        basis=closed.basis,
        **({} if shrunk.plan.vocabulary_alone else {"held_out": shrunk.cost()}),
        **({"vocabulary": shrunk.vocabulary} if shrunk.vocabulary else {}),
        artifacts={"hf": _artifact(folder / "hf")},
        timings={"shrink_seconds": round(shrunk.seconds, 2)},
        environment=manifest.environment()
        | {"device": closed.device, "passes": str(passes).removeprefix("torch.")},
        **({"healing": shrunk.healing} if shrunk.healing else {}),
    )
    write_json(folder / "reports" / "shrink.json", shrunk.as_dict())
    card.write(folder)


def _second(source: str, windows_NL: torch.Tensor) -> dict[str, Any]:
    return {"source": source, "windows": len(windows_NL), "sha256": _sha256(windows_NL)}


def _sha256(windows_NL: torch.Tensor) -> str:
    return hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest()
