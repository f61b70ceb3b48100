"""A tokenizer as transformers reads it, which is what runtimes are held to, and what it is made of.

Shapes: R rows of the model's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dotexport.errors import CheckpointError
from dotexport.models.checkpoint import read_config
from dotexport.models.text_windows import read_tokenizer
from dotexport.vocabulary.aligning import Ids, lengths
from dotexport.vocabulary.pieces import TOKENIZER, Pieces, read_pieces


def have_one_vocabulary(one: Path, other: Path) -> bool:
    """Whether two models have the same tokens under the same ids, as far as their files say.

    Raises:
        CheckpointError: a tokenizer that cannot be read.
    """
    rows = {read_config(folder).get("vocab_size") for folder in (one, other)}
    files = [folder / TOKENIZER for folder in (one, other)]
    if len(rows) > 1 or not all(file.is_file() for file in files):
        return len(rows) == 1
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    return bool(read_tokenizer(one).get_vocab() == read_tokenizer(other).get_vocab())


@dataclass(frozen=True)
class Reading:
    """A tokenizer.

    Attributes:
        stored: tokenizer.json.
        pieces: its section `model`.
        rows: of the model's table.
    """

    tokenizer: Any
    stored: Mapping[str, Any]
    pieces: Pieces
    rows: int

    @classmethod
    def of(cls, folder: Path) -> Reading:
        """The tokenizer of a model folder.

        Raises:
            UnsupportedModelError: no tokenizer.json, or of a kind that cannot lose tokens exactly.
            CheckpointError: transformers cannot load it, or it has tokens without a row.
        """
        stored, pieces = read_pieces(folder)
        rows = read_config(folder).get("vocab_size")
        if type(rows) is not int:
            raise CheckpointError(
                f"{folder / 'config.json'} gives vocab_size = {rows!r}; expected the rows of a "
                "language model's table: is it the config of a decoder model?"
            )
        found = cls(read_tokenizer(folder), stored, pieces, rows)
        if (most := max(pieces.ids.values())) >= found.rows:
            raise CheckpointError(
                f"the tokenizer of {folder} has the token {most}, and the model's table "
                f"{found.rows} rows; expected a row for each: take the tokenizer of this model"
            )
        return found

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token and its id, added ones included; not those without a row, which no model of
        these rows reads (Gemma 3 without its vision tower has one)."""
        everything = self.tokenizer.get_vocab()
        return {token: number for token, number in everything.items() if number < self.rows}

    @cached_property
    def spelled(self) -> dict[int, str]:
        """Id -> token."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def added(self) -> list[str]:
        """Tokens that are looked for in a text as they are; by id."""
        found = sorted(self.tokenizer.added_tokens_decoder.items())
        return [str(token) for number, token in found if number < self.rows]

    @cached_property
    def widths(self) -> Ids:
        """Bytes of text that each id stands for, (R,)."""
        return lengths(self.ids, self.added, self.pieces, self.rows)

    def reads(self, text: str) -> bool:
        """Whether every token of a text has a row."""
        return max(self.tokenizer(text)["input_ids"], default=0) < self.rows

    def encode(self, text: str) -> list[int]:
        """Raises CheckpointError: a token of it has no row."""
        found = list(self.tokenizer(text)["input_ids"])
        if found and max(found) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(found))
            raise CheckpointError(
                f"the text {text[:60]!r} holds the token {token!r}, for which the model has no row "
                f"(it has {self.rows}); take it out of the text"
            )
        return found

    def decode(self, ids: Sequence[int]) -> str:
        said: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return said
