"""What a tokenizer.json is made of, and the same with fewer tokens.

Three kinds of models. BPE makes a token by merging two others, so these stay with it (`needs`);
Unigram and WordPiece look whole pieces up. In each, text whose tokens all stay is split as before:

* BPE applies the merge of the least rank, again and again. The merges that made the original's
  tokens are all there and in the same order, others are fewer, so at every step the same one is
  the least.
* WordPiece takes the longest piece that fits, and it is still there.
* Unigram takes the split of the best sum of scores; it is still there with the same sum, and others
  are fewer. What no piece spells scores ten below the least piece, which therefore stays.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from dotexport.errors import UnsupportedModelError
from dotexport.storage.reading import read_json

TOKENIZER = "tokenizer.json"
BYTES = frozenset(f"<0x{number:02X}>" for number in range(256))
SPACE = "\u2581"  # a space, as SentencePiece writes it


@dataclass(frozen=True)
class Pieces(ABC):
    """The section `model` of a tokenizer.json.

    Attributes:
        stored: the section.
        bytewise: whether its characters are bytes (pre-tokenizer ByteLevel).
    """

    stored: Mapping[str, Any]
    bytewise: bool

    @property
    @abstractmethod
    def ids(self) -> Mapping[str, int]:
        """Token -> id."""

    @abstractmethod
    def only(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        """The section with these tokens, under other ids."""

    def needs(self, token: str) -> Iterable[str]:
        """Tokens without which no text comes to this one."""
        return ()

    def tied(self, one: Sequence[str], other: Sequence[str]) -> bool:
        """Whether a text may as well be split in the one way as in the other."""
        return False

    def spelling(self) -> set[str]:
        """Tokens that spell what no other does: whatever leaves, every text can be written.

        Characters where they are all there is; bytes where unknown characters fall back on them,
        with those of ASCII and the mark for a space.
        """
        alone = {token for token in self.ids if len(self.characters(token)) == 1}
        if self.has_bytes:
            alone = {token for token in alone if token.isascii() or token == SPACE} | BYTES
        return alone | {token for token in self.unknown if token in self.ids}

    @property
    def unknown(self) -> list[str]:
        """The token of what cannot be spelled, if there is one."""
        return [self.stored["unk_token"]] if self.stored.get("unk_token") else []

    @property
    def has_bytes(self) -> bool:
        return bool(self.stored.get("byte_fallback")) and self.ids.keys() >= BYTES

    def characters(self, token: str) -> str:
        """What of its spelling stands for text."""
        return token

    def num_bytes(self, token: str) -> int:
        """Of text that it stands for; so long as they are the same in both, two tokenizations of a
        text can be laid side by side."""
        if self.bytewise:
            return len(token)
        if self.has_bytes and token in BYTES:
            return 1
        return len(self.characters(token).replace(SPACE, " ").encode())


@dataclass(frozen=True)
class Bpe(Pieces):
    """Byte-pair encoding, over bytes or over characters that may fall back on bytes."""

    @property
    def ids(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self.stored["vocab"]
        return found

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs by rank; older files write them as one string."""
        written = self.stored["merges"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in written)
        return [(left, right) for left, right in pairs]

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def needs(self, token: str) -> Iterable[str]:
        """Every token on the way to this one when its own text is encoded.

        No merge crosses the ends of a token that comes out, so within them the way is the same in
        every text. Where it does not lead there, no text does either.
        """
        parts, never = list(token), len(self.ranks)
        seen = set(parts)
        while len(parts) > 1:
            ranks = (self.ranks.get(pair, never) for pair in pairwise(parts))
            rank, at = min((rank, place) for place, rank in enumerate(ranks))
            if rank == never:
                return ()
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            seen.add(parts[at])
        return seen - {token} if seen <= self.ids.keys() else ()

    def only(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        written = zip(self.stored["merges"], self.merges, strict=True)
        stay = [
            pair
            for pair, (left, right) in written
            if left in new_ids and right in new_ids and left + right in new_ids
        ]
        return {**self.stored, "vocab": dict(new_ids), "merges": stay}


@dataclass(frozen=True)
class Unigram(Pieces):
    """Pieces with scores; the place of one is its id."""

    @cached_property
    def ids(self) -> Mapping[str, int]:
        return {piece: number for number, (piece, _) in enumerate(self.stored["vocab"])}

    def tied(self, one: Sequence[str], other: Sequence[str]) -> bool:
        """Sums of scores that differ by rounding: what else the word holds decides."""
        scores = dict(self.stored["vocab"])
        sums = [sum(scores.get(piece, math.nan) for piece in way) for way in (one, other)]
        return math.isclose(*sums, rel_tol=1e-9)

    def spelling(self) -> set[str]:
        least = min(self.stored["vocab"], key=lambda pair: pair[1])[0]
        return super().spelling() | {least}

    @property
    def unknown(self) -> list[str]:
        at = self.stored.get("unk_id")
        return [] if at is None else [self.stored["vocab"][at][0]]

    def only(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        vocab = [[piece, score] for piece, score in self.stored["vocab"] if piece in new_ids]
        places = {piece: number for number, (piece, _) in enumerate(vocab)}
        unknown = next((places[piece] for piece in self.unknown), None)
        return {**self.stored, "vocab": vocab, "unk_id": unknown}


@dataclass(frozen=True)
class WordPiece(Pieces):
    """The longest piece that fits, from the left."""

    @property
    def ids(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self.stored["vocab"]
        return found

    def characters(self, token: str) -> str:
        return token.removeprefix(self.stored.get("continuing_subword_prefix") or "##") or token

    def only(self, new_ids: Mapping[str, int]) -> dict[str, Any]:
        return {**self.stored, "vocab": dict(new_ids)}


KINDS: Mapping[str, type[Pieces]] = {"BPE": Bpe, "Unigram": Unigram, "WordPiece": WordPiece}


def read_pieces(folder: Path) -> tuple[dict[str, Any], Pieces]:
    """tokenizer.json of a model folder, and its section `model`.

    Raises:
        UnsupportedModelError: there is none, or it is of a kind that cannot lose tokens exactly.
        CheckpointError: not JSON.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        raise UnsupportedModelError(
            f"{folder} has no {TOKENIZER}: a slow tokenizer is Python code around files of its own "
            "(tokenizer.model, *.tiktoken), and none is cut here; convert it with transformers, "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL), or leave the vocabulary "
            "as it is"
        )
    content = read_json(file, advice="take a fresh copy")
    model = content.get("model") or {}
    kind = model.get("type") or _guessed(model)
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{file} is a tokenizer of kind {kind}, which turns every word that leaves into one "
            f"unknown token; expected {', '.join(KINDS)}: leave the vocabulary as it is"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if kind == "BPE" and model.get(name):
            raise UnsupportedModelError(
                f"{file} is a BPE with {name} {model[name]!r}, whose merges are spelled otherwise; "
                "leave the vocabulary as it is"
            )
    steps = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    return content, KINDS[kind](model, '"ByteLevel"' in steps)


def _guessed(model: Mapping[str, Any]) -> str:
    """Files of early releases do not say of what kind they are."""
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece or WordLevel"
