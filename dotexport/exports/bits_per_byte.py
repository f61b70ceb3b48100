"""How well a model reads text in tokens of its own: what models of any vocabulary compare in.

Shapes: L tokens of a text, P = L - 1 predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from dotexport.errors import CalibrationError
from dotexport.exports.target import Session
from dotexport.models.checkpoint import read_config
from dotexport.models.text_windows import read_tokenizer


@dataclass(frozen=True)
class Read:
    """Sums over texts; the first token of a text is not predicted, and counts nowhere."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def read_texts(
    session: Session,
    folder: Path,
    texts: Iterable[str],
    progress: Callable[[int], None] = lambda done: None,
) -> Read:
    """Each text from its beginning, as far as the context goes.

    Args:
        session: what runs.
        folder: of its tokenizer and config.

    Raises:
        CalibrationError: texts of less than two tokens each.
        CheckpointError: no tokenizer that can be read.
    """
    tokenizer = read_tokenizer(folder)
    context = read_config(folder).get("max_position_embeddings")
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for number, text in enumerate(texts):
        progress(number)
        ids = tokenizer(text)["input_ids"]
        ids_L, cut = ids[:context], ids[context:] if context else []
        if len(ids_L) < 2:
            continue
        tokens_1L = torch.tensor(ids_L)[None]
        said_PV = torch.from_numpy(session.start(tokens_1L[:, :-1].numpy()))[0]
        nats += float(cross_entropy(said_PV.float(), tokens_1L[0, 1:], reduction="sum"))
        num_tokens += len(ids_L) - 1
        # Of the text itself: not every tokenizer spells what it read.
        unread = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:1], cut))
        num_bytes += len(text.encode()) - sum(len(part.encode()) for part in unread)
    if not num_bytes:
        raise CalibrationError(f"{folder} reads these texts as less than two tokens each")
    return Read(nats, num_tokens, num_bytes)


def spelled(folder: Path, windows_NL: torch.Tensor) -> list[str]:
    """What these windows of a model's tokens say, without special tokens."""
    decode = partial(read_tokenizer(folder).decode, skip_special_tokens=True)
    return [decode(window_L) for window_L in windows_NL.tolist()]
