"""The text that healing trains on, and what is held out of it.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dotexport.errors import UsageError
from dotexport.healing.heal_options import HealOptions, Schedule
from dotexport.healing.healing_stream import Batches, Streamed
from dotexport.models.documents import documents
from dotexport.models.text_options import SELF, Part, TextOptions, parts_of
from dotexport.models.text_windows import read_tokenizer, token_windows
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.sinks import sown, sown_in_steps
from dotexport.narrowing.streams import held_out_windows
from dotexport.storage.manifest import sha256

logger = logging.getLogger(__name__)

OFTEN = 8  # times that text is read before more of it is worth asking for

Own = Callable[[], Iterable[str]]
"""What the original says, without end."""


@dataclass(frozen=True)
class HealingText:
    """Windows to train on, and those that choose the step.

    Attributes:
        source: other text to train on, which is read as it is needed; train_NL is not.
        folder: of the tokenizer that reads it.
        sinks: tokens that are sown in it (narrowing/sinks.py); the windows have them.
    """

    train_NL: Tensor
    held_NL: Tensor
    source: str | None = None
    folder: Path | None = None
    sinks: Sequence[int] = ()

    def batches(self, schedule: Schedule, seed: int, own: Own) -> Callable[[int], Tensor]:
        """Number of a step -> its windows (batch, L)."""
        if self.source is None or self.folder is None:
            return partial(batch, self.train_NL, schedule=schedule, seed=seed)
        tokenizer = read_tokenizer(self.folder)
        streamed = Streamed(
            parts_of(self.source),
            lambda source: own() if source == SELF else documents(source),
            lambda text: list(tokenizer(text)["input_ids"]),
            schedule.length,
            self.held_NL,
            seed,
        )
        drawn = Batches(streamed, schedule.batch)
        return lambda step: sown_in_steps(drawn(step), self.sinks, step)

    def digests(self) -> list[str]:
        parts = (self.train_NL, self.held_NL)
        found = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts]
        if self.source is not None:
            files = [_files(part) for part in parts_of(self.source)]
            found.append(hashlib.sha256(json.dumps(files).encode()).hexdigest())
        return found


def batch(windows_NL: Tensor, step: int, *, schedule: Schedule, seed: int) -> Tensor:
    """The windows of one step: a new order in every epoch, a function of seed and step alone."""
    length, size = schedule.length, schedule.batch
    pieces_NL = windows_NL[:, : windows_NL.shape[1] // length * length].reshape(-1, length)
    drawn = [divmod(step * size + n, len(pieces_NL)) for n in range(size)]
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(pieces_NL))
        for epoch in {epoch for epoch, _ in drawn}
    }
    return pieces_NL[[int(orders[epoch][place]) for epoch, place in drawn]]


def _files(part: Part) -> list[str]:
    """A source, and digests of the files that it is."""
    path = Path(part.source).expanduser()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    return [part.source, *map(sha256, files)]


def healing_text(
    text: CalibrationText,
    model: Path,
    read: TextOptions,
    options: HealOptions,
) -> HealingText:
    """The split that narrowing used too, and more windows of the same text, or other text, where
    asked for.

    Args:
        text: what narrowing used.
        read: how its first kind was read.

    Raises:
        UsageError: fewer windows than calibration has.
        CalibrationError: other text that is not there, or that nothing reads.
    """
    count = len(text.windows_NL)
    if options.samples is not None and options.samples < count:
        raise UsageError(
            f"--heal-samples {options.samples} is less than the {count} windows of "
            "calibration, which healing trains on too; give more, or fewer --samples"
        )
    splits = [split(kind_NL) for kind_NL in text.kinds]
    train_NL, held_NL = (torch.cat(parts) for parts in zip(*splits, strict=True))
    if not len(held_NL):  # a single window is both: nothing can be held out of it
        held_NL = text.windows_NL
    if options.text is not None:
        for part in parts_of(options.text):
            if part.source != SELF:
                next(documents(part.source), None)  # refused now, and not after hours
        return HealingText(train_NL, held_NL, options.text, model, text.sinks)
    if options.samples is not None and options.samples > count:
        everything_NL = token_windows(model, replace(read, samples=options.samples))
        more_NL = sown(everything_NL[count:], text.sinks, seed=count)
        train_NL = torch.cat([train_NL, more_NL])
    _warn_if_repeated(train_NL, read.source, options)
    return HealingText(train_NL, held_NL)


def _warn_if_repeated(train_NL: Tensor, source: str, options: HealOptions) -> None:
    """Say that steps will see the same text again and again."""
    schedule = options.settled(train_NL.shape[1])
    times = schedule.steps * schedule.tokens_per_step / train_NL.numel()
    if times > OFTEN:
        more = source if SELF in [part.source for part in parts_of(source)] else f"{source},{SELF}"
        logger.warning(
            "distillation will read its %d windows of calibration text %.0f times; give it more, "
            "files or what the original writes: --heal-text %s",
            len(train_NL),
            times,
            more,
        )


def split(windows_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to train on, and those that are held out."""
    held = held_out_windows(len(windows_NL))
    train = [n for n in range(len(windows_NL)) if n not in held]
    return windows_NL[train], windows_NL[sorted(held)]
