"""The training text as tokens: one shuffled stream, cut into windows, drawn in seeded batches.

Shapes: N windows in all, B in a batch, L tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dotexport.embedded import evaluation_text
from dotexport.embedded.corpus import (
    STANDARD_LIBRARY,
    Document,
    Source,
    documents,
    telling_lines,
    version_of,
)
from dotexport.embedded.loss import WINDOW, token_stream, windows
from dotexport.embedded.model_card import SourceRead
from dotexport.embedded.tokenizer import save_tokenizer, train_tokenizer
from dotexport.embedded.training_options import TrainOptions


@dataclass(frozen=True)
class Corpus:
    tokenizer: PreTrainedTokenizerFast
    windows_NL: torch.Tensor
    sources: list[SourceRead]
    shared_lines: float


def read_corpus(options: TrainOptions, folder: Path) -> Corpus:
    """Read, tokenize and cut the text, or take what an earlier run left in the folder."""
    found = list(documents())
    if not (folder / "tokens.npy").exists():
        _tokenize(found, options, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int32))
    return Corpus(tokenizer, windows(stream), _sources_read(found), _shared_lines(found))


def _tokenize(found: list[Document], options: TrainOptions, folder: Path) -> None:
    # The standard library and every eighth file of the rest are enough to count pairs on.
    sample = [
        document.text
        for place, document in enumerate(found)
        if document.source.package == STANDARD_LIBRARY or place % 8 == 0
    ]
    tokenizer = train_tokenizer(sample, vocabulary=options.vocabulary, context=WINDOW)
    save_tokenizer(tokenizer, folder)
    rows = [
        np.array(token_stream(tokenizer, [document.text]), dtype=np.uint16) for document in found
    ]
    repeated = [
        row
        for row, document in zip(rows, found, strict=True)
        for _ in range(document.source.copies)
    ]
    order = np.random.default_rng(options.seed).permutation(len(repeated))
    np.save(folder / "tokens.npy", np.concatenate([repeated[place] for place in order]))


def _sources_read(found: list[Document]) -> list[SourceRead]:
    texts: dict[Source, list[str]] = {}
    for document in found:
        texts.setdefault(document.source, []).append(document.text)
    return [
        SourceRead(source, version_of(source), len(rows), sum(map(len, rows)))
        for source, rows in texts.items()
    ]


def _shared_lines(found: list[Document]) -> float:
    """The part of the evaluation modules' telling lines that stands in some training text too."""
    held_out = set().union(*map(telling_lines, evaluation_text()))
    read = set().union(*(telling_lines(document.text) for document in found))
    return len(held_out & read) / len(held_out)


def batches(windows_NL: torch.Tensor, options: TrainOptions, first: int) -> Iterator[torch.Tensor]:
    """Batches from step `first` on: each epoch is a fresh shuffle that hangs on the seed."""
    per_epoch = len(windows_NL) // options.batch
    for step in range(first, options.steps):
        epoch, place = divmod(step, per_epoch)
        if step == first or place == 0:
            order = np.random.default_rng([options.seed, epoch]).permutation(len(windows_NL))
        chosen = order[place * options.batch : (place + 1) * options.batch]
        yield windows_NL[torch.from_numpy(chosen)].long()
