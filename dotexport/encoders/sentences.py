"""Sentences of running text, and rows of a task, which are read as its head is asked: two texts of
one as a pair.

Shapes: N sentences, L tokens of one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.rows import columns_of, read_rows
from dotexport.errors import CalibrationError
from dotexport.models.documents import documents

LEAST_WORDS = 5
HELD_OUT = 4
"""One sentence in so many judges, and is not fitted."""


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
