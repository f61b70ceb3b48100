"""Calibration text that the original samples itself, for a model whose training text is not here.

Every row of a batch is filled with one text behind another; text n of a seed does not depend on
how many rows are computed together. At temperature 1 it is the model's own distribution, so that
KL on it is what a model of its words would lose.

Shapes: B rows, T slots of a row.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dotexport.errors import CalibrationError
from dotexport.generation.starts import CHAT, Script, Starts
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_model
from dotexport.models.memory import head_width
from dotexport.models.text_options import SELF, TextOptions, parts_of
from dotexport.models.text_windows import order_of, window_length
from dotexport.narrowing.prepare import WIDE, multiplies_bfloat16
from dotexport.storage.files import write_text
from dotexport.storage.manifest import sha256
from dotexport.storage.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

LONGEST = 512  # slots of a row: what lies before a text in its row is read for nothing
MOST_ROWS = {"cpu": 128, "cuda": 512}
# Of a batch behind which steps follow: the same on every machine of a kind, and a small cache.
ENDLESS_ROWS = {"cpu": 32, "cuda": 256}
MESSAGE = 64  # tokens of a user's message, at most
SPARE = 1.05  # tokens that are read back as fewer
STAGE = "sampling text from the original"


@dataclass(frozen=True)
class Sampled:
    """One text, and how it began and ended."""

    text: str
    kind: str
    ended: bool


@dataclass(frozen=True)
class OwnText:
    """Texts of one model.

    Attributes:
        num_tokens: of all texts, as the tokenizer reads them.
        num_slots: tokens that were computed.
        precision: of the computation.
    """

    texts: tuple[Sampled, ...]
    num_tokens: int
    num_slots: int
    seconds: float
    precision: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        count = len(self.texts)
        return {
            "texts": count,
            "tokens": self.num_tokens,
            "chats": sum(text.kind == CHAT for text in self.texts) / count,
            "ended": sum(text.ended for text in self.texts) / count,
            "tokens_per_second": round(self.num_slots / self.seconds, 1),
            "precision": self.precision,
            "seed": self.seed,
        }

    def write(self, file: Path) -> None:
        """JSON lines with `text`, as `--calib FILE` takes them."""
        rows = ({"text": t.text, "kind": t.kind, "ended": t.ended} for t in self.texts)
        write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))


class Row:
    """Texts one behind another, as a model says them.

    Attributes:
        start: slot at which the text of now began.
        said: texts so far: script, tokens, whether it came to its end.
    """

    given: deque[int]
    freely: int  # tokens of this turn that the model said

    def __init__(self, scripts: Iterable[Script], ends: frozenset[int]) -> None:
        self.scripts, self.ends = iter(scripts), ends
        self.said: list[tuple[Script, list[int], bool]] = []
        self._begin(0)

    def first(self) -> int:
        """The token of slot 0."""
        return self._give()

    def next(self, drawn_here: int, slot: int) -> int:
        """The token of this slot, where the model would say `drawn_here`."""
        if self.given:
            return self._give()
        over = drawn_here in self.ends
        if self.pieces and (over or self.freely >= MESSAGE):
            self.given, self.freely = deque(self.pieces.popleft()), 0
            return self._give()
        if over:
            self._finish(drawn_here)
            self._begin(slot)
            return self._give()
        self.freely += 1
        self.ids.append(drawn_here)
        return drawn_here

    def close(self) -> None:
        """No slot is left: the text of now is what it is so far, if the model said any of it."""
        if len(self.ids) > len(self.script.pieces[0]):
            self.said.append((self.script, self.ids, False))

    def _begin(self, slot: int) -> None:
        self.start, self.script = slot, next(self.scripts)
        self.pieces = deque(self.script.pieces)
        self.given = deque(self.pieces.popleft())
        self.ids: list[int] = []
        self.freely = 0

    def _give(self) -> int:
        self.ids.append(self.given.popleft())
        return self.ids[-1]

    def _finish(self, end: int) -> None:
        self.said.append((self.script, [*self.ids, end], True))


def sample_text(
    source: Checkpoint,
    *,
    tokens: int,
    seed: int = 0,
    longest: int = LONGEST,
    device: torch.device | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> OwnText:
    """At least so many tokens of text. The whole model is in memory, in bfloat16 where the device
    multiplies it.

    Args:
        longest: tokens of a text, at most.

    Raises:
        CheckpointError: no tokenizer, or weights that are not whole.
        CalibrationError: what it says is no text.
    """
    began = time.perf_counter()
    device = device or torch.device("cpu")
    starts = Starts.of(source.folder)
    progress(STAGE, 0, 1)
    wide = source.config["hidden_size"] >= WIDE
    dtype = torch.bfloat16 if wide and multiplies_bfloat16(device) else torch.float32
    model = load_model(source, dtype).to(device)
    num_slots = min(row_length(model.config), longest)
    most = _affordable_rows(model, num_slots)
    texts: list[Sampled] = []
    rows = found = 0
    while found < tokens:
        left = math.ceil(SPARE * (tokens - found) / num_slots)
        parts = math.ceil(left / most)
        batch = range(rows, rows + math.ceil(left / parts))
        progress(STAGE, min(found, tokens), tokens)
        said = _batch(
            model,
            starts,
            batch,
            num_slots,
            seed,
            lambda done: progress(STAGE, min(found + done, tokens), tokens),  # noqa: B023
        )
        rows = batch.stop
        new = [Sampled(starts.text(ids), s.kind, ended) for s, ids, ended in said]
        texts += (text for text in new if text.text)
        gained = sum(len(starts.tokenizer(t.text)["input_ids"]) for t in new if t.text)
        if not gained:
            raise CalibrationError(
                f"{source.folder} says nothing that its tokenizer reads as text; give text to "
                "--calib"
            )
        found += gained
    seconds = time.perf_counter() - began
    precision = str(dtype).removeprefix("torch.")
    return OwnText(tuple(texts), found, rows * num_slots, seconds, precision, seed)


def texts_without_end(
    model: Any,
    folder: Path,
    *,
    seed: int,
    first: int,
    workspace: Workspace,
) -> Iterator[str]:
    """What a model that is in memory goes on saying, in its own dtype, a batch of rows at a time.

    Args:
        folder: of its tokenizer.
        first: row to begin with, so that texts differ from those of other rows.
        workspace: keeps every batch, so that it is said once.

    Raises:
        CalibrationError: what it says is no text.
    """
    starts, num_slots = Starts.of(folder), row_length(model.config)
    count = ENDLESS_ROWS[model.get_input_embeddings().weight.device.type]
    while True:
        name = f"{SELF}-{first}"
        if kept := workspace.load(name):
            texts = kept[0]["texts"]
        else:
            logger.info("%s: %d tokens", STAGE, count * num_slots)
            rows = range(first, first + count)
            with _attention_of_its_own(model.config):
                said = _batch(model, starts, rows, num_slots, seed, lambda done: None)
            texts = [text for _, ids, _ in said if (text := starts.text(ids))]
            if not texts:
                raise CalibrationError(
                    f"{folder} says nothing that its tokenizer reads as text; give healing other "
                    "text than self"
                )
            workspace.save(name, {"texts": texts})
        yield from texts
        first += count


@contextmanager
def _attention_of_its_own(config: Any) -> Iterator[None]:
    """Reading in lockstep leaves another kind of attention behind."""
    own = config._attn_implementation
    try:
        yield
    finally:
        config._attn_implementation = own


def write_own_text(
    source: Checkpoint,
    text: TextOptions,
    samples: int,
    file: Path,
    *,
    seed: int,
    device: torch.device,
    workspace: Workspace | None = None,
    progress: Progress = lambda stage, done, total: None,
    step: str = SELF,
    longest: int = LONGEST,
) -> tuple[TextOptions, dict[str, Any]]:
    """Sample what `self` in a text stands for and write it to a file; nothing where it has none.

    Args:
        samples: windows that are read of the text at most, those that are skipped besides.
        workspace: keeps what was sampled, by the name of `step`.
        longest: tokens of a text, at most.

    Returns:
        The text with that file, and what a manifest says of it.
    """
    parts = parts_of(text.source)
    names = [part.source for part in parts]
    if SELF not in names:
        return text, {}
    wanted = text.skip + samples
    order = order_of([part.weight for part in parts], [wanted] * len(parts), wanted)
    windows = sum(number == names.index(SELF) for number, _ in order)
    tokens = max(windows, 1) * window_length(source.folder, text)
    workspace = workspace or Workspace()
    if kept := workspace.load(step):
        said = kept[0]["said"]
        write_text(file, kept[0]["lines"])
    else:
        asked = {"tokens": tokens, "seed": seed, "longest": longest}
        own = sample_text(source, **asked, device=device, progress=progress)
        own.write(file)
        said = own.as_dict()
        workspace.save(step, {"said": said, "lines": file.read_text(encoding="utf-8")})
    return replace(text, own=str(file)), said | {"sha256": sha256(file)}


def row_length(config: Any) -> int:
    """Slots of a row: no more than any layer sees, so that no window is ever left."""
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    return min(LONGEST, context, getattr(config, "sliding_window", None) or LONGEST)


def _batch(
    model: Any,
    starts: Starts,
    numbers: range,
    num_slots: int,
    seed: int,
    told: Callable[[int], None],
) -> list[tuple[Script, list[int], bool]]:
    from dotexport.generation.lockstep import Lockstep, drawn  # and all of transformers' classes

    random = [np.random.default_rng([seed, number]) for number in numbers]
    heights = np.stack([r.random(num_slots, dtype=np.float32) for r in random])
    rows = [Row(starts.scripts(r), starts.ends) for r in random]
    lockstep = Lockstep(model, num_slots)
    uniform_BT = torch.from_numpy(heights).to(lockstep.device)
    token_B = torch.tensor([row.first() for row in rows], device=lockstep.device)
    for slot in range(num_slots - 1):
        start_B = torch.tensor([row.start for row in rows], device=lockstep.device)
        logits_BV = lockstep.read(token_B, start_B)
        said = drawn(logits_BV, uniform_BT[:, slot]).tolist()
        here = [row.next(token, slot + 1) for row, token in zip(rows, said, strict=True)]
        token_B = torch.tensor(here, device=lockstep.device)
        told((slot + 1) * len(rows))
    for row in rows:
        row.close()
    return [text for row in rows for text in row.said]


def _affordable_rows(model: Any, num_slots: int) -> int:
    """Rows whose cache takes no more than a quarter of the memory that is free."""
    config, weight = model.config, model.get_input_embeddings().weight
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config)
    each *= num_slots * weight.element_size()
    if weight.device.type == "cuda":
        free = torch.cuda.mem_get_info(weight.device)[0]
    else:
        free = int(psutil.virtual_memory().available)
    return max(1, min(MOST_ROWS[weight.device.type], free // 4 // int(each)))
