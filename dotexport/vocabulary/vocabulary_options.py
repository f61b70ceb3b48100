"""A smaller vocabulary: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.models.text_options import SOURCES
from dotexport.options import option

MULTIPLE = 64
"""Rows of a table come in these: vLLM fills a table up to it, matrix kernels take tiles of 64 and
128, and devices that share a table divide it."""


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """Which tokens stay. The cut is exact on these, and comes before everything else.

    Attributes:
        vocab: how many, rounded up to a multiple of 64; None: those that occur in `vocab_for`.
        vocab_for: text that says which; None: the calibration text.
        keep_tokens: file of tokens that stay whatever the text says (vocabulary/keeping.py).
    """

    vocab: int | None = option(
        None,
        help="Tokens that stay, up to the next multiple of 64: those used most, or expected there "
        "by a decoder, beside bytes, special tokens, the chat template's, and what merges need.",
    )
    vocab_for: str | None = option(
        None,
        help="Text that counts the use of tokens; without --vocab, all that occur in it stay. "
        f"{SOURCES}",
    )
    keep_tokens: str | None = option(
        None,
        help="File of tokens that stay besides, one a line: as tokenizer.json spells it, as a JSON "
        'string ("12"), or an id.',
    )

    def __post_init__(self) -> None:
        if self.vocab is not None and self.vocab < 1:
            raise UsageError(f"--vocab must be at least 1, not {self.vocab}")
        if self.keep_tokens is not None and not self.asked:
            raise UsageError(
                "--keep-tokens says what a smaller vocabulary keeps; give --vocab N or "
                "--vocab-for TEXT as well"
            )

    @property
    def asked(self) -> bool:
        """Whether any token is to leave."""
        return self.vocab is not None or self.vocab_for is not None


def padded(count: int, available: int) -> int:
    """Rows of a table that holds so many tokens, of those that are there.

    >>> padded(1, 500), padded(64, 500), padded(490, 500)
    (64, 64, 490)
    """
    rounded = -(-count // MULTIPLE) * MULTIPLE
    return rounded if rounded <= available else count
