"""Whether a smaller tokenizer is the original with fewer tokens: held against it on text.

Shapes: N tokens of a text by the original, B boundaries that both tokenizations have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dotexport.errors import CheckpointError
from dotexport.vocabulary.aligning import Aligned, Ids, align
from dotexport.vocabulary.segmenting import Reading

MOST = 1 << 20  # characters of a text that are read twice
# What user's text may lack: scripts, joined and decomposed characters, code, runs.
OTHER = (
    "The quick brown fox jumps over 13 lazy dogs. It's 3.14, isn't it?",
    "caf\u00e9 na\u00efve \u00c9COLE Stra\u00dfe cafe\u0301 \ufb01ne \u212b A\u030a\u0323",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u6771\u4eac\u306f\uff1f \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001d518 \U00020000",
    'def f(x):\n\treturn  x ** 2  # ok\r\n\n\n{"a": [1, null]} <b>&nbsp;</b> \\frac{1}{2}',
    " " * 40 + "=" * 70 + "a" * 50 + "1234567890" * 3 + "\u2581\u2581 \u2026\u201cx\u201d\u2014",
)


@dataclass(frozen=True)
class Proof:
    """What came out, over all texts of a source.

    Attributes:
        tokens: of the original, and how many of them stand between boundaries that both have, with
            nothing that left among them: these are the mapped ones.
        bytes: of the text.
        tokens_per_byte: before and after.
    """

    tokens: int
    mapped: int
    bytes: int
    tokens_after: int

    @property
    def tokens_per_byte(self) -> tuple[float, float]:
        return self.tokens / self.bytes, self.tokens_after / self.bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "tokens": self.tokens,
            "mapped": self.mapped,
            "tokens_per_byte": list(self.tokens_per_byte),
        }


def check_names(before: Reading, after: Reading, kept: Sequence[int]) -> None:
    """Every token that stays has the id that its row has.

    Raises:
        CheckpointError: one has another.
    """
    place = {number: n for n, number in enumerate(kept)}
    wanted = {token: place[number] for token, number in before.ids.items() if number in place}
    if after.ids != wanted:
        different = sorted(set(after.ids.items()) ^ set(wanted.items()))
        raise CheckpointError(
            "the smaller tokenizer, as transformers reads it, gives tokens other ids than their "
            f"rows have ({len(different)}, first {different[0]}); its files say more than is "
            "known here: leave the vocabulary as it is"
        )


def prove(before: Reading, after: Reading, kept: Sequence[int], texts: Iterable[str]) -> Proof:
    """Hold tokens and round trips of texts against the original's.

    Raises:
        CheckpointError: tokens that all stayed are split otherwise, or a text comes back otherwise.
    """
    new_R = np.full(before.rows, -1, dtype=np.int64)
    new_R[list(kept)] = np.arange(len(kept))
    total = [0, 0, 0, 0]
    for text in _start(texts):
        one, other = before.encode(text), after.encode(text)
        if not one and not other:
            continue
        both = align(one, other, before.widths, after.widths)
        found = (len(one), _mapped(both, new_R, before, text), len(text.encode()), len(other))
        total = [a + b for a, b in zip(total, found, strict=True)]
        if before.decode(one) != after.decode(other):
            raise CheckpointError(
                f"text no longer comes back from the smaller tokenizer as it did ({text[:60]!r}); "
                "leave the vocabulary as it is"
            )
    return Proof(*total)


def _mapped(both: Aligned, new_R: Ids, before: Reading, text: str) -> int:
    """Tokens of the original that are the same ones under new ids; between two boundaries that
    both have, those must be all that stayed, or as good a split of the same text."""
    new_N = new_R[both.one_N]
    starts_B, ends_B = both.marks_B2[:-1], both.marks_B2[1:]
    left_N = np.concatenate([[0], (new_N < 0).cumsum()])
    stayed_B = left_N[ends_B[:, 0]] == left_N[starts_B[:, 0]]
    same_B = ((ends_B - starts_B) == 1).all(1)
    same_B &= new_N[starts_B[:, 0]] == both.other_M[starts_B[:, 1]]
    old_A, spelled = np.flatnonzero(new_R >= 0), before.spelled
    for at in np.flatnonzero(stayed_B & ~same_B):
        (i, j), (k, m) = starts_B[at], ends_B[at]
        ways = both.one_N[i:k], old_A[both.other_M[j:m]]
        if not before.pieces.tied(*([spelled[n] for n in way.tolist()] for way in ways)):
            raise CheckpointError(
                f"tokens that stayed are split otherwise by the smaller tokenizer, from token {i} "
                f"of {text[:60]!r} on; leave the vocabulary as it is"
            )
    return int((stayed_B & same_B).sum())


def _start(texts: Iterable[str]) -> Iterator[str]:
    room = MOST
    for text in texts:
        yield text[:room]
        room -= len(text)
        if room <= 0:
            return
