"""Sentences in, embeddings out: the folder's own pooling, or the mean of all tokens. Rows of a task
are read as its head is asked, two texts of one as a pair.

Shapes: N sentences, L tokens of one, D width of the stream.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.rows import columns_of, read_rows
from dotexport.errors import CalibrationError, UnsupportedModelError
from dotexport.models.documents import documents
from dotexport.storage.reading import read_json

LEAST_WORDS = 5
HELD_OUT = 4
"""One sentence in so many judges, and is not fitted."""
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


Text = tuple[str, ...]
"""What is read at once: a sentence, or two texts of a row."""


@dataclass(frozen=True)
class Batch:
    """Sentences as a model reads them.

    Attributes:
        inputs: input_ids, attention_mask and what else the tokenizer says, (N, L) each.
        held: takes part in no fit.
    """

    inputs: dict[str, Tensor]
    held: bool = False

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"].bool()


def read_sentences(options: SentenceOptions, *, more: int = 0) -> list[Text]:
    """Sentences of a text, or rows of a task, at most `samples` and `more` besides.

    Raises:
        CalibrationError: there are too few to fit and to judge.
    """
    rows = _rows(options.source)
    found = list(islice(rows or _sentences(options.source), options.samples + more))
    if len(found) < HELD_OUT * 4:
        what = "rows of a task" if rows else f"sentences of {LEAST_WORDS} words and more"
        raise CalibrationError(
            f"{options.source} holds {len(found)} {what}; expected {HELD_OUT * 4} at least: give "
            "more of them"
        )
    return found


def _rows(source: str) -> list[Text]:
    """Of a file of a task; none of any other."""
    file = Path(source)
    if file.suffix.lower() != ".jsonl" or not file.is_file():
        return []
    rows = read_rows(file)
    columns = columns_of(rows)
    return [] if columns == ("text",) else [tuple(row[name] for name in columns) for row in rows]


def _sentences(source: str) -> Iterator[Text]:
    for document in documents(source):
        for line in document.splitlines():
            for sentence in re.split(r"(?<=[.!?])\s+", line.strip()):
                if len(sentence.split()) >= LEAST_WORDS:
                    yield (sentence,)


def batches(encoder: Encoder, sentences: Sequence[Text], options: SentenceOptions) -> list[Batch]:
    """Batches of sentences of about one length, which need little padding; the same sentences
    together whatever reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder.home)
    most = min(options.seqlen, context_of(encoder))
    size = min(options.batch, max(1, len(sentences) // HELD_OUT))
    held = list(sentences[HELD_OUT - 1 :: HELD_OUT])
    fitted = [text for n, text in enumerate(sentences, 1) if n % HELD_OUT]
    made: list[Batch] = []
    for some in (fitted, held):
        ordered = sorted(some, key=lambda text: sum(map(len, text)))
        for start in range(0, len(ordered), size):
            columns = map(list, zip(*ordered[start : start + size], strict=True))
            inputs = tokenizer(
                *columns, padding=True, truncation=True, max_length=most, return_tensors="pt"
            )
            made.append(Batch(taken(encoder, inputs), held=some is held))
    return made


def taken(encoder: Encoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a tokenizer's answer the model takes."""
    takes = inspect.signature(encoder.base.forward).parameters
    return {name: value for name, value in inputs.items() if name in takes}


def read_by_both(
    ours: Encoder, theirs: Encoder, sentences: Sequence[Text], options: SentenceOptions
) -> list[tuple[Batch, Batch]]:
    """The same sentences in the tokens of each, which may be fewer than the original's."""
    read = batches(ours, sentences, options)
    if ours is theirs:
        return list(zip(read, read, strict=True))
    return list(zip(read, batches(theirs, sentences, options), strict=True))


def context_of(encoder: Encoder) -> int:
    """Tokens that there are positions for; RoBERTa counts them from behind its padding."""
    most = int(encoder.config.get("max_position_embeddings", 512))
    return most - 2 if encoder.kind.counts_from_padding else most


def pooling_of(encoder: Encoder) -> str:
    """`mean` or `cls`: what the folder's 1_Pooling says, and `mean` where it says nothing.

    Raises:
        UnsupportedModelError: another pooling, or modules behind it that are not normalisation.
    """
    file = encoder.root / "modules.json"
    if not file.is_file():
        return "mean"
    modules = json.loads(file.read_text(encoding="utf-8"))
    found = "mean"
    for module in modules:
        word = str(module["type"]).rpartition(".")[2]
        if word == "Pooling":
            place = encoder.root / module["path"] / "config.json"
            said: dict[str, Any] = read_json(place, advice="take a fresh copy")
            named = [key for key, value in said.items() if "_mode" in key and value]
            names = [POOLINGS.get(key) for key in named]
            if said.get("pooling_mode") in ("mean", "cls"):  # as later releases write it
                names = [said["pooling_mode"]]
            if len(names) != 1 or names[0] is None:
                raise UnsupportedModelError(
                    f"{place} pools by {', '.join(named)}; expected mean or cls alone"
                )
            found = names[0]
        elif word not in ("Transformer", "Normalize"):
            raise UnsupportedModelError(
                f"{file} has a module {word}; expected Transformer, Pooling and Normalize alone"
            )
    return found


def pooled(hidden_NLD: Tensor, mask_NL: Tensor, pooling: str) -> Tensor:
    """Embeddings of unit length, (N, D)."""
    if pooling == "cls":
        return nn.functional.normalize(hidden_NLD[:, 0], dim=-1)
    mask_NL1 = mask_NL[..., None].to(hidden_NLD.dtype)
    mean_ND = (hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1)
    return nn.functional.normalize(mean_ND, dim=-1)


@torch.no_grad()
def embed(base: nn.Module, some: Sequence[Batch], pooling: str) -> Tensor:
    """Embeddings of all sentences, (N, D)."""
    return torch.cat(
        [pooled(base(**batch.inputs).last_hidden_state, batch.mask, pooling) for batch in some]
    )


def mean_cosine(ours_ND: Tensor, theirs_ND: Tensor) -> float:
    """Of embeddings of the same sentences."""
    return float((ours_ND * theirs_ND).sum(-1).mean())
