"""A session over a cache that grows by one slot per token, padding included.

A slot filled by padding stays where it is and stays masked; the positions of the tokens that
follow go on from each prompt's own length.

Shapes: B sequences, L new tokens, T slots of the cache after them, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dotexport.exports.target import Logits, Tokens


class GrowingSession(ABC):
    """Keeps mask and positions; a runtime adds how it forgets and how it runs."""

    mask_BT: Tokens
    length_B: Tokens

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        self.length_B = np.array([L] * B if lengths_B is None else lengths_B, dtype=np.int64)
        self.mask_BT = (np.arange(L) < self.length_B[:, None]).astype(np.int64)
        self.forget(B)
        return self.run(as_int64(tokens_BL), np.tile(np.arange(L), (B, 1)))

    def step(self, tokens_B: Tokens) -> Logits:
        seen_B1 = np.ones((len(tokens_B), 1), dtype=np.int64)
        self.mask_BT = np.concatenate([self.mask_BT, seen_B1], axis=1)
        logits_B1V = self.run(as_int64(tokens_B)[:, None], self.length_B[:, None])
        self.length_B = self.length_B + 1
        return logits_B1V[:, 0]

    @abstractmethod
    def forget(self, num_sequences: int) -> None:
        """Empty the cache."""

    @abstractmethod
    def run(self, tokens_BL: Tokens, position_BL: Tokens) -> Logits:
        """Append tokens to the cache under `mask_BT`; logits_BLV."""


def as_int64(tokens: Tokens) -> Tokens:
    return np.ascontiguousarray(tokens, dtype=np.int64)
