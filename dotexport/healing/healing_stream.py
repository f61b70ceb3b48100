"""Text to distil on that is read, or said by the original, as steps ask for it.

Windows come in an order that is a function of the sources, their weights and the seed. What is in
memory is a pool of each file's or data set's next windows, of which every one is drawn at random.

Shapes: N windows, L tokens per window, S tokens of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotexport.errors import CalibrationError
from dotexport.models.text_options import SELF, Part
from dotexport.narrowing.sinks import TAIL

logger = logging.getLogger(__name__)

POOL = 1024  # windows
RUN = 64  # tokens: text that has so many in common with a held-out window is that text
PIECE = 1 << 20  # characters of a document that are encoded together

Window = NDArray[np.int64]


@dataclass(frozen=True)
class Streamed:
    """Sources by weight, cut into windows.

    Attributes:
        documents: of a source, from its beginning; one without end may give them for ever.
        encode: text to tokens.
        length: tokens of a window.
        held_NL: windows that are left out, wherever in a source they are.
    """

    parts: Sequence[Part]
    documents: Callable[[str], Iterable[str]]
    encode: Callable[[str], list[int]]
    length: int
    held_NL: Tensor
    seed: int

    def __iter__(self) -> Iterator[Window]:
        """Without end. Next is always the source that is furthest behind its share.

        Raises:
            CalibrationError: a source that has not one window to train on.
        """
        held = Runs(self.held_NL.numpy(), self.length)
        streams = [self._windows(number, held) for number in range(len(self.parts))]
        taken = [0] * len(streams)
        while True:
            number = min(range(len(streams)), key=lambda n: (taken[n] + 1) / self.parts[n].weight)
            taken[number] += 1
            yield next(streams[number])

    def _windows(self, number: int, held: Runs) -> Iterator[Window]:
        """Of one source, again and again, in another order each time."""
        source, epoch = self.parts[number].source, 0
        while True:
            random = np.random.default_rng([self.seed, number, epoch])
            spared = filter(held.spare, self._cut(source))
            # What the original says has no order, and is made when it is needed.
            found: Iterator[Window] = spared if source == SELF else shuffled(spared, random)
            first = next(found, None)
            if first is None:
                raise CalibrationError(
                    f"{source} gives not one window of {self.length} tokens that is not held out; "
                    "give healing more text"
                )
            yield first
            yield from found
            epoch += 1

    def _cut(self, source: str) -> Iterator[Window]:
        left: list[int] = []
        for document in self.documents(source):
            for piece in pieces(document):
                left += self.encode(piece)
                whole = len(left) // self.length * self.length
                yield from np.asarray(left[:whole], dtype=np.int64).reshape(-1, self.length)
                del left[:whole]


def shuffled(windows: Iterator[Window], random: np.random.Generator) -> Iterator[Window]:
    """All of them, each drawn from a pool of those that come next."""
    pool: list[Window] = []
    for window in windows:
        if len(pool) < POOL:
            pool.append(window)
            continue
        place = int(random.integers(POOL))
        yield pool[place]
        pool[place] = window
    yield from (pool[place] for place in random.permutation(len(pool)))


def pieces(document: str) -> Iterator[str]:
    """A document, or parts of one that is a whole corpus, cut at ends of lines."""
    start = 0
    while len(document) - start > PIECE:
        end = document.rfind("\n", start, start + PIECE) + 1
        end = end if end > start else start + PIECE
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


class Runs:
    """All runs of some tokens in held-out windows, by their hashes.

    Args:
        length: of the windows that will be asked about.
    """

    def __init__(self, held_NL: Window, length: int) -> None:
        # Held-out windows may have a token sown in their last fifth (narrowing/sinks.py).
        least = min(length, held_NL.shape[1])
        self._size = min(RUN, least - least // TAIL)
        factors = np.random.default_rng(0).integers(1 << 63, size=self._size, dtype=np.uint64)
        self._factors_S = 2 * factors + np.uint64(1)
        self._known = np.unique(self._hashes(held_NL))

    def spare(self, window_L: Window) -> bool:
        """Whether a window has nothing of them."""
        return not np.isin(self._hashes(window_L), self._known).any()

    def _hashes(self, windows: Window) -> NDArray[np.uint64]:
        """Of every run, sums of odd multiples modulo 2^64."""
        runs = np.lib.stride_tricks.sliding_window_view(windows, self._size, axis=-1)
        hashes: NDArray[np.uint64] = runs.astype(np.uint64) @ self._factors_S
        return hashes.ravel()


class Batches:
    """The windows of each step, read one behind another."""

    def __init__(self, streamed: Streamed, size: int) -> None:
        self._streamed, self._size = streamed, size
        self._begin()

    def _begin(self) -> None:
        self._windows, self._step = iter(self._streamed), 0

    def __call__(self, step: int) -> Tensor:
        """(batch, L) of a step; those of the steps before it are read and left."""
        if step < self._step:
            self._begin()
        while True:
            here = [next(self._windows) for _ in range(self._size)]
            self._step += 1
            if self._step > step:
                return torch.from_numpy(np.stack(here))
