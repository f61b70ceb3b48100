"""Targets: what an adapter must offer, how one is found by name, and the export verb.

Shapes: B sequences of a batch, L tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dotexport.checkpoint import Checkpoint

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class Session(Protocol):
    """One artifact, loaded in its own runtime, with its KV cache."""

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        """Prefill: empty the cache, read the prompts, return logits_BLV.

        Prompts shorter than L are padded on the right; `lengths_B` says how long each one is
        (None: all are L). Logits at padded positions mean nothing.
        """
        ...

    def step(self, tokens_B: Tokens) -> Logits:
        """Decode: append one token to every sequence of the cache, return its logits_BV."""
        ...


class Target(Protocol):
    """An adapter to one runtime. `export`, `verify` and `bench` use nothing but this."""

    name: str
    precisions: tuple[str, ...]
    """What it can write, the default first."""

    def missing(self) -> list[str]:
        """What has to be installed before this target can write and run; empty: ready."""
        ...

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        """Every reason why this target cannot hold this model; empty: it can."""
        ...

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        """Write the artifact of a stock checkpoint into an empty folder."""
        ...

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        """Load what `write` made, on `threads` CPU threads (None: the runtime's own choice).

        Raises:
            RuntimeMissingError: the runtime is not installed, or its provider fell back.
        """
        ...


@dataclass(frozen=True)
class Artifact:
    """What one target wrote: `files` maps names below `folder` to bytes and SHA-256."""

    target: str
    precision: str
    folder: Path
    files: dict[str, tuple[int, str]]

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())
