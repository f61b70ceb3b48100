"""The eval verb: what a narrowed model predicts and says, the original beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dotexport.app.shrinking import OWN_TEXT
from dotexport.app.steps import EvalStep
from dotexport.errors import UsageError
from dotexport.exports.target import Session, find_target
from dotexport.exports.verifying import STOCK, picked, require_device, require_runtime
from dotexport.generation import health
from dotexport.generation.generation_options import GenerationOptions
from dotexport.generation.starts import Starts
from dotexport.models.checkpoint import read_config
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
    sides = sides_of(out, baseline, step.artifacts, where)
    check_eval(step, step.artifacts)
    read = (made.get("calibration") or {}).get("source"), (made.get("healing") or {}).get("text")
    doubts = (one_source(text, step.text.source, out / OWN_TEXT) for text in read if text)
    doubt = next(filter(None, doubts), None)
    if doubt:
        logger.warning("%s", doubt)
    asked: dict[str, Any] = {"device": str(where), "progress": progress}
    if have_one_vocabulary(out / STOCK, baseline):
        quality = evaluate(out / STOCK, baseline, token_windows(baseline, step.text), **asked)
    else:
        quality = evaluate_across(out / STOCK, baseline, step.text, **asked)
    seqlen = window_length(baseline, step.text)
    record = {**quality.as_dict(), "text": step.text.source, "seqlen": seqlen}
    record |= {"one_source": doubt} if doubt else {}
    if step.generation.prompts:
        record["generation"] = generation_of(sides, step.text, step.generation, progress)
    if step.tasks.names:
        record["tasks"] = tasks_of(sides, step.tasks, progress)
    manifest.update(out, quality=record)
    card.write(out)
    return record


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


def sides_of(out: Path, baseline: Path, specs: Sequence[str], device: torch.device) -> list[Side]:
    """The original, OUT/hf and the artifacts of these specs."""
    stock: Any = find_target(STOCK)
    found = [
        Side(name, folder, partial(stock.open, folder, device=str(device)))
        for name, folder in ((health.ORIGINAL, baseline), (STOCK, out / STOCK))
    ]
    for name, (target, _) in picked(out, specs).items():
        if name != STOCK:
            require_runtime(target)
            require_device(target)
            manifest.require_unchanged(out / name)
            found.append(Side(name, out / STOCK, partial(target.open, out / name)))
    return found


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
