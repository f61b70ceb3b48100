"""Which tokens stay.

    always      what spells any text (bytes, characters), special and added tokens, the chat
                template's, ids that config files name, and those that the user lists
    used        in the text, the most used first
    expected    not in the text, but by the original's odds there (expecting.py), which count as
                much as what occurs, and a little by ids
    ancestors   tokens that no text uses by themselves, without which BPE does not come to others
    filled      further ones in the order of their ids, which is that of their use in training, up
                to a number of rows that runtimes like: no row stays that nobody could sample

Shapes: R rows of the original's table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import SizeError, UsageError
from dotexport.vocabulary.pieces import Pieces
from dotexport.vocabulary.vocabulary_options import padded

Counts = NDArray[np.int64]

# Of what is added to uses for tokens of other text: a tenth as much, flat among the first ranks.
ZIPF_SHARE, ZIPF_RANKS = 0.1, 300


@dataclass(frozen=True)
class Kept:
    """The tokens that stay.

    Attributes:
        ids: of the original, ascending; the place of one is its new id.
        rows: of the original's table.
        tokens: of the original; rows that no token has leave first.
        groups: why they stay -> how many.
        covered: share of the tokens of the counted text that stay; None: nothing was counted.
        expected: share of what the original expects there that stays: of the next text of its kind
            about as much will; None: it was not asked.
    """

    ids: tuple[int, ...]
    rows: int
    tokens: int
    groups: Mapping[str, int]
    covered: float | None
    expected: float | None = None

    @property
    def new_ids(self) -> dict[int, int]:
        return {number: place for place, number in enumerate(self.ids)}

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [self.rows, len(self.ids)],
            "tokens": [self.tokens, len(self.ids) - self.groups.get("empty rows", 0)],
            "kept": dict(self.groups),
            "ancestors": self.groups.get("ancestors", 0) / len(self.ids),
            "covered": self.covered,
            "expected": self.expected,
        }


class _Choice:
    """Tokens taken so far, each with all that it needs."""

    def __init__(self, pieces: Pieces, ids: Mapping[str, int]) -> None:
        self.pieces, self.ids = pieces, ids
        self.spelled = {number: token for token, number in ids.items()}
        self.groups: dict[int, str] = {}

    def missing(self, number: int) -> list[int]:
        """What has to join with this one, itself included."""
        token = self.spelled.get(number, "")
        needed = self.pieces.needs(token) if token in self.pieces.ids else ()
        found = {number, *(self.ids[part] for part in needed)}
        return sorted(found - self.groups.keys())

    def take(self, numbers: Iterable[int], group: str, room: float, others: str = "") -> None:
        """Those that fit with all that they need; what is needed alone goes under `others`."""
        for number in numbers:
            if len(self.groups) >= room:
                return
            joining = self.missing(number)
            if len(self.groups) + len(joining) <= room:
                self.groups |= dict.fromkeys(joining, others or group)
                self.groups[number] = group


def keep(
    pieces: Pieces,
    ids: Mapping[str, int],
    counts_R: Counts,
    always: Iterable[int],
    *,
    wanted: int | None,
    expected_R: NDArray[np.float64] | None = None,
) -> Kept:
    """Choose the tokens that stay.

    Args:
        ids: every token and its id, added ones included.
        counts_R: how often each occurs in the text.
        always: ids that stay besides what spells any text.
        wanted: how many, rounded up (`padded`); None: all that occur.
        expected_R: how often the original expects each at a position of the text; None: unknown.

    Raises:
        SizeError: fewer than must stay, more than there are, or all of them.
    """
    rows, everything = len(counts_R), sorted(ids.values())
    if wanted is not None and wanted > rows:
        raise SizeError(f"--vocab {wanted} is more than the {rows} rows of the original's table")
    choice, ancestors = _Choice(pieces, ids), "ancestors"
    use_R = counts_R if expected_R is None else _likely(counts_R, expected_R)
    by_use = sorted((n for n in everything if use_R[n] > 0), key=lambda n: (-use_R[n], n))
    first = sorted({*always, *(ids[token] for token in pieces.spelling())})
    choice.take(first, "always", np.inf, ancestors)
    least = len(choice.groups)
    if wanted is not None and least > padded(wanted, rows):
        raise SizeError(
            f"--vocab {wanted} is too few: bytes or characters, special tokens, those of the chat "
            f"template and what they are merged from are {least}; give at least that"
        )
    room = rows if wanted is None else padded(wanted, rows)
    choice.take((n for n in by_use if n not in choice.groups), "used", room, ancestors)
    room = padded(len(choice.groups), rows) if wanted is None else room
    choice.take((n for n in everything if n not in choice.groups), "filled", room)
    empty = sorted(set(range(rows)) - set(everything))
    choice.take((n for n in empty if n not in choice.groups), "empty rows", room)
    if len(choice.groups) == rows:
        raise SizeError(
            f"all {rows} rows would stay, so that nothing leaves; give a smaller --vocab, or a "
            "text that uses fewer tokens"
        )
    ids_K = sorted(choice.groups)
    return Kept(
        tuple(ids_K),
        rows,
        len(everything),
        _counted(choice.groups, counts_R),
        float(counts_R[ids_K].sum() / counts_R.sum()) if counts_R.any() else None,
        None if expected_R is None else float(expected_R[ids_K].sum() / expected_R.sum()),
    )


def _likely(counts_R: Counts, expected_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often each token is to be expected in the next text: as it occurred, as the original
    expected it, and for text of another kind as Zipf's law has it of ids."""
    zipf_R = 1 / (np.arange(len(counts_R)) + ZIPF_RANKS)
    found: NDArray[np.float64] = expected_R + counts_R / counts_R.sum()
    found += ZIPF_SHARE * zipf_R / zipf_R.sum()
    return found


def _counted(groups: Mapping[int, str], counts_R: Counts) -> dict[str, int]:
    """Why -> how many; what others need and the text uses too is used."""

    def named_by(number: int, group: str) -> str:
        if group not in ("used", "ancestors"):
            return group
        unused = {"used": "expected", "ancestors": "ancestors"}
        return "used" if counts_R[number] else unused[group]

    named = [named_by(number, group) for number, group in groups.items()]
    order = ("always", "used", "expected", "ancestors", "filled", "empty rows")
    return {name: named.count(name) for name in order if name in named}


def listed(file: str, ids: Mapping[str, int], rows: int) -> list[int]:
    """Ids of a file with one token a line: as tokenizer.json spells it, as a JSON string, or an id.

    Raises:
        UsageError: no such file, or a line that is none of these.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--keep-tokens {file} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not (said := line.removesuffix("\r")):
            continue
        token = _read(said, ids, rows)
        if token is None:
            raise UsageError(
                f"{file}, line {number}: {said!r} is no token of the model; expected one as "
                'tokenizer.json spells it (\u0120word, \u2581word), as a JSON string ("12"), or '
                f"an id from 0 to {rows - 1}"
            )
        found.append(token)
    return found


def _read(said: str, ids: Mapping[str, int], rows: int) -> int | None:
    if said.isascii() and said.isdigit():
        return int(said) if int(said) < rows else None
    if said in ids:
        return ids[said]
    try:
        spelled = json.loads(said)
    except ValueError:
        return None
    return ids.get(spelled) if isinstance(spelled, str) else None
