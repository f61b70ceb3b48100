"""Which tokens the original expects in text: those that the next text may use, this one or not.

Most tokens of a large vocabulary occur once or never in a text of megabytes, so counts say little
about the next text of its kind. The original's odds, summed over the positions of a part of it, say
how often each token is to be expected there, whether it then came or another did.

Shapes: N windows, L tokens of one, C positions of a chunk, R rows of the original's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dotexport.errors import CheckpointError
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded

WINDOWS, LENGTH = 64, 512  # that the original reads of the text, from all over it
TOKENS_PER_BATCH = 4096
CHUNK_BYTES = 128 << 20  # of one chunk's logits; a few of these exist at a time

Progress = Callable[[str, int, int], None]
Expect = Callable[[torch.Tensor], NDArray[np.float64]]
"""From windows of a text, (N, L), to how often each row is expected at one of its positions."""


class Spread:
    """Windows from all over a text whose length is not known, each as likely as any other
    (reservoir sampling), and the same ones each time.

    Args:
        count: windows that are kept, at most.
        length: tokens of one.
    """

    def __init__(self, count: int = WINDOWS, length: int = LENGTH) -> None:
        self.count, self.length = count, length
        self._random = np.random.default_rng(0)
        self._kept: list[tuple[int, list[int]]] = []
        self._rest: list[int] = []
        self._seen = 0

    def read(self, ids: Sequence[int]) -> None:
        """The next tokens of the text."""
        self._rest += ids
        whole = len(self._rest) // self.length * self.length
        for start in range(0, whole, self.length):
            place = self._seen if self._seen < self.count else self._random.integers(self._seen + 1)
            found = self._seen, self._rest[start : start + self.length]
            if place < len(self._kept):
                self._kept[place] = found
            elif place < self.count:
                self._kept.append(found)
            self._seen += 1
        del self._rest[:whole]

    def windows(self) -> torch.Tensor:
        """(N, L), in the order of the text; of one that is shorter than a window, all of it."""
        kept = [ids for _, ids in sorted(self._kept)] or [self._rest]
        return torch.tensor(kept, dtype=torch.long)


@torch.inference_mode()
def expected(
    original: Checkpoint,
    windows_NL: torch.Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
) -> NDArray[np.float64]:
    """Mean over all positions of the original's odds of every row as the next token; sums to 1.

    A model that does not fit into memory is read part by part for every batch of windows, its head
    for every chunk of their logits.

    Raises:
        CheckpointError: weights that are not whole, or odds that are NaN.
    """
    stage = "asking the original which tokens it expects"
    progress(stage, 0, len(windows_NL))
    loaded = Loaded(original, dtype, device=device)
    rows = original.config["vocab_size"]
    step = max(1, (CHUNK_BYTES if loaded.whole else 8 * CHUNK_BYTES) // (4 * rows))
    sums_R = torch.zeros(rows, dtype=torch.float64)
    batch = max(1, TOKENS_PER_BATCH // windows_NL.shape[1])
    for number, windows_BL in enumerate(windows_NL.split(batch)):
        progress(stage, number * batch, len(windows_NL))
        hidden_CD = loaded.hidden(windows_BL).flatten(0, 1)
        for some_CD in hidden_CD.split(step):
            odds_CR = loaded.head(some_CD[None])[0].float().softmax(-1)
            sums_R += odds_CR.sum(0, dtype=torch.float64).cpu()
    if not bool(sums_R.sum().isfinite()):
        raise CheckpointError(
            f"the logits of {original.folder} are NaN or infinite on the text that tokens are "
            "chosen by; expected a model that works in transformers: take an undamaged copy"
        )
    found: NDArray[np.float64] = (sums_R / windows_NL.numel()).numpy()
    return found
