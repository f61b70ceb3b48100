"""llama.cpp's library in this very process: what `bench --llama-cpp` times.

Shapes: B sequences, L tokens of the longest prompt, T tokens of all sequences, V vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dotexport.errors import DotexportError, RuntimeMissingError, UsageError
from dotexport.exports.target import Logits, Tokens

from .llama_library import Library, Model

LIBRARY = re.compile(r"(lib)?llama(\.v?[\d.]+\d)?\.(so|dylib|dll)(\.\d+)*")
HEADROOM = 256  # tokens after a prompt, where nobody says how many there will be


class LlamaSession:
    """A session of one GGUF file.

    Args:
        where: a folder of llama.cpp, or one of its programs or libraries.
        threads: None: half of the processors.
        capacity: tokens that the cache of each sequence holds; None: 256 more than the prompt.
        lean: answer prompts as a server needs it: logits of the last position alone.

    Raises:
        RuntimeMissingError: no llama.cpp there, or one that does not load here.
        DotexportError: it does not run the file.
    """

    def __init__(
        self,
        where: Path,
        file: Path,
        *,
        threads: int | None = None,
        capacity: int | None = None,
        lean: bool = False,
    ) -> None:
        found = find_library(where)
        try:
            library = Library(found.resolve())
        except (OSError, AttributeError) as error:
            raise unusable(found, str(error)) from error
        with _its_words():
            self.model = Model(library, str(file), capacity or 0, threads or own_threads())
        self.capacity, self.lean = capacity, lean
        # A build for GPUs decides by itself what it takes there.
        self.offloads = bool(library.llama_supports_gpu_offload())
        device = "a GPU if it finds one" if self.offloads else "cpu"
        build = f" (ggml {library.build})" if library.build else ""
        self.providers = (f"llama.cpp{build} on {device}",)

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        self.model.context = self.capacity or L + HEADROOM
        self._check_room(L)
        prompts = [row[:length] for row, length in zip(tokens_BL, lengths, strict=True)]
        with _its_words():
            logits_TV = self.model.start(prompts, last_only=self.lean)
        return logits_TV[:, None] if self.lean else side_by_side(logits_TV, lengths, L)

    def step(self, tokens_B: Tokens) -> Logits:
        self._check_room(max(self.model.lengths) + 1)
        with _its_words():
            return self.model.step(tokens_B)

    def _check_room(self, length: int) -> None:
        if length > self.model.context:
            raise UsageError(
                f"a sequence of {length} tokens does not fit a cache of {self.model.context}; "
                "open the file with a larger capacity"
            )


@contextmanager
def _its_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DotexportError(
            f"{error}; dotexport verify OUT --target llama.cpp --llama-cpp PATH says more"
        ) from error


def own_threads() -> int:
    """Its threads wait for each other by spinning: one too many costs more than one too few."""
    return max(1, (os.cpu_count() or 1) // 2)


def side_by_side(logits_TV: Logits, lengths: Sequence[int], longest: int) -> Logits:
    """logits_BLV, zero at padded positions, of prompts one after another."""
    logits_BLV = np.zeros((len(lengths), longest, logits_TV.shape[1]), dtype=np.float32)
    ends = np.cumsum(lengths)
    for row, length, end in zip(logits_BLV, lengths, ends, strict=True):
        row[:length] = logits_TV[end - length : end]
    return logits_BLV


def find_library(where: Path) -> Path:
    """libllama of an installation, of which `where` is the folder or any file.

    Raises:
        RuntimeMissingError: there is none.
    """
    if where.is_file() and LIBRARY.fullmatch(where.name):
        return where
    home = where.resolve().parent if where.is_file() else where
    beside = [home.parent / "lib"] if where.is_file() else []
    for folder in (home, *beside):
        found = sorted(file for file in folder.rglob("*llama*") if LIBRARY.fullmatch(file.name))
        if found:
            return min(found, key=lambda file: (len(file.parts), len(file.name)))
    raise RuntimeMissingError(
        f"{where} holds no library of llama.cpp (libllama.so, libllama.dylib or llama.dll); "
        "expected the folder of a llama.cpp release, or one of its programs"
    )


def unusable(library: Path, why: str) -> RuntimeMissingError:
    return RuntimeMissingError(
        f"{library} cannot be used ({why}); expected llama.cpp of 2025-07 or later, built for this "
        "machine"
    )
