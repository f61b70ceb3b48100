"""The eval verb: what a narrowed model predicts and says, the original beside it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dotexport.app.shrink_record import OWN_TEXT
from dotexport.app.steps import EvalStep
from dotexport.errors import UsageError
from dotexport.exports.bits_per_byte import read_texts, spelled
from dotexport.exports.target import Session, find_target
from dotexport.exports.verifying import STOCK, picked, require_device, require_runtime
from dotexport.generation import health
from dotexport.generation.generation_options import GenerationOptions
from dotexport.generation.second_text import second_text
from dotexport.generation.starts import Starts
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.models.finding import find_model
from dotexport.models.memory import LIMIT, fits
from dotexport.models.text_options import TextOptions
from dotexport.models.text_origins import one_source
from dotexport.models.text_windows import read_tokenizer, token_windows, window_length
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.prepare import pick_device
from dotexport.outputs import card
from dotexport.storage import manifest
from dotexport.tasks.task_options import TaskOptions

logger = logging.getLogger(__name__)

STAGE = "continuing texts"
OTHER_SAMPLES, OTHER_LENGTH = 16, 256  # windows of the second text and their tokens, at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Side:
    """A model that is judged, or the original it is judged by.

    Attributes:
        name: of its folder in the output, or `original`.
        folder: of a checkpoint with its tokenizer.
        open: loads it.
    """

    name: str
    folder: Path
    open: Callable[[], Session]


def evaluate_into(
    out: Path,
    baseline: Path,
    step: EvalStep,
    *,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Evaluate OUT/hf, and artifacts where asked for, beside the original; record it in OUT.

    Raises:
        CheckpointError: no output, or an artifact that was changed since.
        RuntimeMissingError: a runtime or device of an artifact is not here.
        DotexportError: as of what is asked: text, models, sizes.
    """
    from dotexport.exports.quality import evaluate
    from dotexport.exports.two_vocabularies import evaluate_across
    from dotexport.vocabulary.segmenting import have_one_vocabulary

    made = manifest.read(out)  # refuses what is no output
    where = pick_device(device)
    check_eval(step, step.artifacts)
    asks = bool(step.generation.prompts or step.tasks.names or step.rival)
    dtype = dtype_of_sessions(out, baseline, step, where) if asks else step.dtype
    sides = [] if dtype is None else sides_of(out, baseline, step.artifacts, where, dtype)
    rivals = _rivals(step.rivals, {side.name for side in sides}, where, dtype or step.dtype)
    read = (made.get("calibration") or {}).get("source"), (made.get("healing") or {}).get("text")
    every = made.get("shrink", {}).get("text", {}).get("every") or 1
    doubts = (
        one_source(text, step.text.source, out / OWN_TEXT, every=every) for text in read if text
    )
    doubt = next(filter(None, doubts), None)
    if doubt:
        logger.warning("%s", doubt)
    numbers = {"device": str(where), "dtype": DTYPES[step.dtype]}
    asked: dict[str, Any] = numbers | {"progress": progress}
    same = have_one_vocabulary(out / STOCK, baseline)

    def judged(text: TextOptions) -> dict[str, Any]:
        if same:
            quality = evaluate(out / STOCK, baseline, token_windows(baseline, text), **asked)
        else:
            quality = evaluate_across(out / STOCK, baseline, text, **asked)
        told = {"text": text.source, "seqlen": window_length(baseline, text), "dtype": step.dtype}
        return quality.as_dict() | told

    record = judged(step.text) | ({"one_source": doubt} if doubt else {})
    texts = [step.text]
    with tempfile.TemporaryDirectory() as scratch:
        other = second_text(
            Checkpoint.open(baseline),
            step.text,
            step.other,
            Path(scratch) / "self.jsonl",
            samples=min(step.text.samples, OTHER_SAMPLES),
            seqlen=OTHER_LENGTH,
            device=where,
            progress=progress,
        )
        if other is not None:
            texts.append(other)
            record["other"] = judged(other)
        if rivals:
            compared = [side for side in sides if side.name in (health.ORIGINAL, STOCK)] + rivals
            record["bits_per_byte"] = bits_of(compared, texts, progress)
    sides += rivals
    if step.generation.prompts and sides:
        found = generation_of(sides, step.text, step.generation, progress)
        record["generation"] = found | {"dtype": dtype}
    if step.tasks.names:
        record["tasks"] = tasks_of(sides, step.tasks, progress)
    manifest.update(out, quality=record)
    card.write(out)
    return record


def dtype_of_sessions(
    out: Path, baseline: Path, step: EvalStep, device: torch.device
) -> str | None:
    """What both models speak in: what was asked for, or bf16 where they are stored so and only
    that fits as a whole. None: neither does, and what would read all files for each token is left
    out.

    Raises:
        UsageError: tasks or rivals were asked for, and a model does not fit.
    """
    models = [Checkpoint.open(folder) for folder in (out / STOCK, baseline)]
    largest = max(models, key=lambda model: model.num_parameters)
    halves = all(spec.dtype == torch.bfloat16 for model in models for spec in model.specs.values())
    for dtype in dict.fromkeys((step.dtype, *(["bf16"] if halves else []))):
        if fits(largest.num_parameters * DTYPES[dtype].itemsize, device):
            return dtype
    words = (
        f"{largest.folder} does not fit into memory as a whole ({largest.num_bytes / 1e9:.1f} GB "
        f"as stored; a model may take half of what is free, or {LIMIT} GB)"
    )
    if step.tasks.names or step.rival:
        flag = "--tasks" if step.tasks.names else "--rival"
        raise UsageError(f"{words}, which {flag} needs; leave it away, or take a larger machine")
    logger.warning("%s: what the models say by themselves is left out", words)
    return None


def check_eval(step: EvalStep, exported: Sequence[str]) -> None:
    """Refuse now what would be refused after models were narrowed or measured.

    Args:
        exported: specs of the artifacts that there are, or will be.

    Raises:
        RuntimeMissingError: the harness is not installed.
        UsageError: no folder of questions, or an artifact that nobody exports.
    """
    if step.tasks.names:
        import_module("dotexport.tasks.asking")  # it says what is missing here
        for name in step.tasks.names:
            step.tasks.definition(name)
    strange = {spec.partition(":")[0] for spec in step.artifacts} - {
        spec.partition(":")[0] for spec in (STOCK, *exported)
    }
    if strange:
        raise UsageError(
            f"eval asks for artifacts of {min(strange)}, which the recipe does not export"
        )


def sides_of(
    out: Path, baseline: Path, specs: Sequence[str], device: torch.device, dtype: str = "fp32"
) -> list[Side]:
    """The original, OUT/hf and the artifacts of these specs."""
    stock: Any = find_target(STOCK)
    found = [
        Side(name, folder, partial(stock.open, folder, device=str(device), dtype=dtype))
        for name, folder in ((health.ORIGINAL, baseline), (STOCK, out / STOCK))
    ]
    for name, (target, _) in picked(out, specs).items():
        if name != STOCK:
            require_runtime(target)
            require_device(target)
            manifest.require_unchanged(out / name)
            found.append(Side(name, out / STOCK, partial(target.open, out / name)))
    return found


def _rivals(named: Sequence[str], taken: set[str], device: torch.device, dtype: str) -> list[Side]:
    """Models of somebody else, by the names of their folders."""
    stock: Any = find_target(STOCK)
    found = []
    for name in named:
        folder = find_model(name)
        if folder.name in taken:
            raise UsageError(f"two models are called {folder.name}; rename the folder of --rival")
        taken.add(folder.name)
        opened = partial(stock.open, folder, device=str(device), dtype=dtype)
        found.append(Side(folder.name, folder, opened))
    return found


def bits_of(
    sides: Sequence[Side], texts: Sequence[TextOptions], progress: Progress
) -> list[dict[str, Any]]:
    """Bits per byte of every text by every side, each in its own tokens; the first is the
    original, whose windows are what is read."""
    folder = sides[0].folder
    read = {text.source: spelled(folder, token_windows(folder, text)) for text in texts}
    rows: list[dict[str, Any]] = [{"text": source, "models": {}} for source in read]
    for side in sides:
        session = side.open()
        for row in rows:
            said = read[row["text"]]
            told = partial(_told_reading, progress, side.name, len(said))
            row["models"][side.name] = read_texts(session, side.folder, said, told).bits_per_byte
    return rows


def _told_reading(progress: Progress, name: str, total: int, done: int) -> None:
    progress(f"reading in its own tokens: {name}", done, total)


def generation_of(
    sides: Sequence[Side], text: TextOptions, options: GenerationOptions, progress: Progress
) -> dict[str, Any]:
    """Figures of what every side goes on with; the first is the original."""
    folder = sides[0].folder
    starts = {side.folder: Starts.of(side.folder) for side in sides}
    windows_NL = token_windows(folder, replace(text, samples=min(text.samples, options.prompts)))
    prompts = {
        health.PLAIN: health.plain_prompts(starts[folder], windows_NL.tolist()),
        health.CHAT: health.chat_prompts(starts[folder], options.prompts),
    }
    context = int(read_config(folder).get("max_position_embeddings") or 1 << 30)
    tokens = min(options.tokens, context // 2)
    prompts = {
        kind: _fitting(found, starts[folder], context // 4) for kind, found in prompts.items()
    }
    rows: list[health.Health] = []
    theirs: dict[str, list[health.Continuation]] = {}
    for side in sides:
        session = side.open()
        for kind, asked in prompts.items():
            if not asked:
                continue
            stage = f"{STAGE}: {side.name}, {kind}"
            said = health.continued(
                session,
                starts[side.folder],
                asked,
                kind,
                tokens,
                lambda done, stage=stage: progress(stage, done, tokens),  # type: ignore[misc]
            )
            decode = starts[folder].tokenizer.decode
            rows.append(health.judge(side.name, kind, said, theirs.get(kind), decode))
            theirs.setdefault(kind, said)
        del session  # before the next one comes
    for row in rows:
        for sentence in row.words:
            logger.warning("%s, %s: %s", row.model, row.kind, sentence)
    return {
        "prompts": {kind: len(asked) for kind, asked in prompts.items()},
        "tokens": tokens,
        "rows": [asdict(row) for row in rows],
    }


def tasks_of(
    sides: Sequence[Side], options: TaskOptions, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each task and metric, with every side's value; the first is the original."""
    from dotexport.tasks.asking import SessionModel, ask, table

    answers = {}
    for side in sides:
        config = read_config(side.folder)
        model = SessionModel(
            side.open(),
            read_tokenizer(side.folder),
            context=int(config.get("max_position_embeddings") or 1 << 30),
            vocabulary=config["vocab_size"],
            told=partial(progress, f"asking tasks of {side.name}"),
        )
        answers[side.name] = ask(model, options)
    return table(answers, sides[0].name)


def _fitting(prompts: Sequence[str], starts: Starts, longest: int) -> list[str]:
    """Prompts that leave room for an answer."""
    return [p for p in prompts if 0 < len(starts.tokenizer(p)["input_ids"]) <= longest]
