"""Rows with answers, and how many a model gets right: the metrics of GLUE and of SQuAD 1.1.

A row is a line of JSON: one or two texts and a `label`, or `context`, `question` and `answers`.
Labels are numbers, or names that config.json's label2id knows.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.rows import Row, columns_of
from dotexport.encoders.sentences import Batch, context_of, taken
from dotexport.errors import CalibrationError, UsageError
from dotexport.models.text_windows import read_tokenizer

HIDDEN = "last_hidden_state"
Said = dict[str, Tensor]
Say = Callable[[Batch], Said]
"""What a model answers to a batch, by the name of the output."""
Scores = dict[str, float]

LONGEST_ANSWER = 30
"""Tokens, as BERT's own script for SQuAD has it."""
LEAST = 32
"""Tokens: half for the question, an eighth that windows share, and those that mark both."""
BEST = 20
"""So many likeliest starts and ends are paired."""


def scores(
    encoder: Encoder,
    say: Say,
    rows: Sequence[Row],
    options: SentenceOptions,
    progress: Progress = lambda stage, done, total: None,
) -> Scores:
    """What of the rows the model gets right, by the metrics of its kind of head.

    Raises:
        CalibrationError: a row lacks what this head is asked or answers.
        UsageError: the model has no head for sequences or questions, or --seqlen is too short.
    """
    name = type(encoder.model).__name__
    asked = _Asked(encoder, say, options.batch, min(options.seqlen, context_of(encoder)))
    if name.endswith("ForQuestionAnswering"):
        return asked.questions(rows, progress)
    if name.endswith("ForSequenceClassification"):
        return asked.classes(rows, progress)
    raise UsageError(
        f"{name} answers no labelled rows; expected a model with a head for sequences "
        "(ForSequenceClassification) or questions (ForQuestionAnswering)"
    )


@dataclass(frozen=True)
class _Asked:
    """A model that reads so many tokens at most, so many texts at once."""

    encoder: Encoder
    say: Say
    batch: int
    most: int

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.encoder.home)

    def read(self, *texts: list[str], **more: Any) -> Any:
        asked = {"padding": True, "truncation": True, "return_tensors": "pt", **more}
        return self.tokenizer(*texts, max_length=self.most, **asked)

    def answer(self, inputs: Mapping[str, Tensor]) -> Said:
        """To any number of texts, a batch at a time."""
        inputs = taken(self.encoder, inputs)
        parts = [
            self.say(Batch({name: x[start : start + self.batch] for name, x in inputs.items()}))
            for start in range(0, len(inputs["input_ids"]), self.batch)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def classes(self, rows: Sequence[Row], progress: Progress) -> Scores:
        settings: Any = self.encoder.model.config
        columns = columns_of(rows)
        found = []
        for start in range(0, len(rows), self.batch):
            progress("asking", start, len(rows))
            some = rows[start : start + self.batch]
            read = self.read(*([row[name] for row in some] for name in columns))
            found.append(self.answer(read)["logits"])
        progress("asking", len(rows), len(rows))
        logits_NC = torch.cat(found).double().numpy()
        if settings.num_labels == 1:
            labels_N = np.array([_number(row, number) for number, row in enumerate(rows, 1)])
            return _correlations(logits_NC[:, 0], labels_N)
        names = {str(name): int(label) for name, label in settings.label2id.items()}
        labels = [_label(row, number, names) for number, row in enumerate(rows, 1)]
        return class_scores(logits_NC.argmax(-1), np.array(labels), settings.num_labels)

    def questions(self, rows: Sequence[Row], progress: Progress) -> Scores:
        """A context that is longer than there is room for is read in windows that overlap."""
        wanted = [_answers(row, number) for number, row in enumerate(rows, 1)]
        if self.most < LEAST:
            raise UsageError(
                f"--seqlen {self.most} is too short for questions; expected {LEAST} at least"
            )
        best = [_Span() for _ in rows]
        for start in range(0, len(rows), self.batch):
            progress("asking", start, len(rows))
            some = rows[start : start + self.batch]
            read = self.read(
                [self.first_tokens(row["question"].strip()) for row in some],
                [row["context"] for row in some],
                truncation="only_second",
                stride=self.most // 8,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            whose = read.pop("overflow_to_sample_mapping").tolist()
            offsets_WL2 = read.pop("offset_mapping")
            made = self.answer(read)
            for window, row in enumerate(whose):
                in_context_L = torch.tensor([part == 1 for part in read.sequence_ids(window)])
                logits_2L = torch.stack([made[f"{end}_logits"][window] for end in ("start", "end")])
                found = _span(logits_2L.masked_fill(~in_context_L, -torch.inf))
                if found and found[0] > best[start + row].score:
                    score, first, last = found
                    begins, ends = offsets_WL2[window, first, 0], offsets_WL2[window, last, 1]
                    best[start + row] = _Span(score, some[row]["context"][begins:ends])
        progress("asking", len(rows), len(rows))
        return answer_scores([span.text for span in best], wanted)

    def first_tokens(self, text: str) -> str:
        """As many of a question as leave half of the room to the context."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, most = read["offset_mapping"], self.most // 2
        return text if len(offsets) <= most else text[: offsets[most - 1][1]]


@dataclass(frozen=True)
class _Span:
    """The likeliest answer so far."""

    score: float = float("-inf")
    text: str = ""


def _number(row: Row, number: int) -> float:
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise CalibrationError(f"row {number} has label {label!r}; expected a number")
    return float(label)


def _label(row: Row, number: int, names: Mapping[str, int]) -> int:
    label = row.get("label")
    if isinstance(label, str):  # a number is one, even where a class is called by another
        label = names.get(label, label)
    if type(label) is not int or label not in names.values():
        known = ", ".join(f"{name} ({n})" for name, n in names.items())
        raise CalibrationError(
            f"row {number} has label {row.get('label')!r}; expected one of {known}"
        )
    return label


def class_scores(said_N: np.ndarray, labels_N: np.ndarray, classes: int) -> Scores:
    """Accuracy; F1 of class 1 of two, their mean over more classes; Matthews correlation.

    The last is R_K of Gorodkin (2004), which for two classes is Matthews' own; 0 where one side
    names one class alone.
    """
    counts_CC = np.zeros((classes, classes))
    np.add.at(counts_CC, (labels_N, said_N), 1.0)
    right_C, true_C, named_C = np.diag(counts_CC), counts_CC.sum(1), counts_CC.sum(0)
    f1_C = 2 * right_C / np.maximum(true_C + named_C, 1)
    total, right = len(labels_N), right_C.sum()
    spread = np.sqrt((total**2 - named_C @ named_C) * (total**2 - true_C @ true_C))
    agreed = right * total - true_C @ named_C
    return {
        "accuracy": float(right / total),
        "f1": float(f1_C[1] if classes == 2 else f1_C.mean()),
        "matthews": float(agreed / spread) if spread else 0.0,
    }


def _correlations(said_N: np.ndarray, labels_N: np.ndarray) -> Scores:
    from scipy import stats

    return {
        "pearson": float(stats.pearsonr(said_N, labels_N).statistic),
        "spearman": float(stats.spearmanr(said_N, labels_N).statistic),
    }


def _answers(row: Row, number: int) -> list[str]:
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    asked = all(isinstance(row.get(name), str) for name in ("context", "question"))
    if not (asked and isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        raise CalibrationError(
            f"row {number} is no question with an answer; expected context, question and answers "
            "(a list of texts, or SQuAD's {'text': [...]})"
        )
    return texts


def _span(logits_2L: Tensor) -> tuple[float, int, int] | None:
    """Score and both ends of the likeliest pair; None where no token is of the context."""
    starts, ends = (side.topk(min(BEST, len(side))).indices.tolist() for side in logits_2L)
    pairs = (
        (float(logits_2L[0, first] + logits_2L[1, last]), first, last)
        for first in starts
        for last in ends
        if first <= last < first + LONGEST_ANSWER
    )
    found = max(pairs, default=None)
    return found if found and found[0] > float("-inf") else None


def answer_scores(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Scores:
    """Exact match and F1 of words, as SQuAD 1.1 counts them (Rajpurkar et al. 2016, section 6.1):
    case, punctuation and articles do not count, and the nearest of several answers does."""
    exact, overlap = [], []
    for text, answers in zip(said, wanted, strict=True):
        words = _words(text)
        exact.append(max(float(words == _words(answer)) for answer in answers))
        overlap.append(max(_shared(words, _words(answer)) for answer in answers))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _shared(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))
