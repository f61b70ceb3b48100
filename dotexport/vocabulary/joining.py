"""Tokens of a model that lost some, as its original reads and predicts them.

Where a token left, smaller pieces spell it, which the original never saw beside each other: read
as they are, it denies the second behind the first. Yet it knows their odds. Joined to the token
that they spell, it reads them well, and its predictions of whole tokens p tell those of pieces:

    behind whole tokens   the sum of p over every token that begins with this piece   (1)
    within a token        the sum of p over tokens that begin with the pieces so far and this one,
                          over the same without this one                              (2)

which is the chain rule, if a piece that is a token by itself did not end one. It may: (2) is worth
the share of p that goes on, of what begins with these pieces.

Shapes: B windows, L tokens of one, C = B * L predictions, R some of them, O rows of the original's
table, V rows that stay, T tokens that left, S of them that go on behind given pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dotexport.vocabulary.pieces import TOKENIZER
from dotexport.vocabulary.segmenting import Reading
from dotexport.vocabulary.trimming import Trimmed

Pieces = tuple[int, ...]
END, UNKNOWN = -1, -2  # behind whole tokens; within a token, of whose odds nothing was read


@dataclass(frozen=True)
class Spellings:
    """How tokens that left are written with those that stay.

    Attributes:
        kept: the original's id of each row.
        spelled: the original's id of a token that left -> rows of its pieces, two or more.
    """

    kept: tuple[int, ...]
    spelled: Mapping[int, Pieces]

    @classmethod
    def of(cls, model: Trimmed) -> Spellings:
        """By the tokenizer that it was given, token by token: no merge crosses the ends of one.

        What is spelled with bytes of a character, or begins otherwise in the middle of a word
        (WordPiece), is left out, and read as its pieces.
        """
        tokens = Reading.of(model.original.folder).pieces.ids
        splitting = Tokenizer.from_file(str(model.folder / TOKENIZER)).model
        stay, spelled = set(model.kept.ids), {}
        for token, number in tokens.items():
            if number not in stay:
                pieces = splitting.tokenize(token)
                if len(pieces) > 1 and "".join(piece.value for piece in pieces) == token:
                    spelled[number] = tuple(piece.id for piece in pieces)
        return cls(model.kept.ids, spelled)

    @cached_property
    def wholes(self) -> dict[Pieces, int]:
        return {pieces: number for number, pieces in self.spelled.items()}

    @cached_property
    def lengths(self) -> dict[int, list[int]]:
        """First piece -> of how many pieces tokens are that begin with it, most first."""
        found: dict[int, set[int]] = {}
        for first, *rest in self.wholes:
            found.setdefault(first, set()).add(1 + len(rest))
        return {first: sorted(lengths, reverse=True) for first, lengths in found.items()}

    @cached_property
    def beginnings(self) -> dict[Pieces, int]:
        """What some token begins with -> its number."""
        found: dict[Pieces, int] = {}
        for pieces in self.spelled.values():
            for count in range(1, len(pieces)):
                found.setdefault(pieces[:count], len(found))
        return found

    def joined(self, tokens_BL: Tensor) -> Joined:
        """As the original reads these windows: from the left, the longest that pieces spell."""
        read = [self._joined(row_L) for row_L in tokens_BL.tolist()]
        ids_BL, at_BL, given_BL = (torch.tensor(part) for part in zip(*read, strict=True))
        offsets_B1 = at_BL.shape[1] * torch.arange(len(at_BL))[:, None]
        at_C = (offsets_B1 + at_BL).flatten()
        place = tokens_BL.device
        return Joined(ids_BL.to(place), at_C.to(place), given_BL.flatten())

    def _joined(self, row_L: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        ids: list[int] = []
        at: list[int] = []
        given: list[int] = []
        place = 0
        while place < len(row_L):
            pieces = self._whole(row_L, place)
            for count in range(1, len(pieces)):
                before = len(ids) - 1
                at.append(max(before, 0))
                given.append(self.beginnings[pieces[:count]] if ids else UNKNOWN)
            ids.append(self.wholes[pieces] if len(pieces) > 1 else self.kept[pieces[0]])
            at.append(len(ids) - 1)
            given.append(END)
            place += len(pieces)
        # What comes behind is looked at by nobody, and of one length graphs are compiled once.
        return ids + [ids[-1]] * (len(row_L) - len(ids)), at, given

    def _whole(self, row_L: Sequence[int], place: int) -> Pieces:
        for count in self.lengths.get(row_L[place], ()):
            pieces = tuple(row_L[place : place + count])
            if pieces in self.wholes:
                return pieces
        return (row_L[place],)

    # Predictions ------------------------------------------------------------------------------

    def odds(self, p_RO: Tensor, given_R: Tensor) -> tuple[Tensor, Tensor]:
        """Equations (1) and (2): log-probabilities (R, V) of pieces, and what each prediction is
        worth (R,), from 0 to 1.

        Args:
            p_RO: the original's probabilities.
            given_R: `Joined.given_C`.
        """
        kept_V, left_T, first_T = (part.to(p_RO.device) for part in self.tables)
        p_RV = p_RO[:, kept_V].index_add_(1, first_T, p_RO[:, left_T])
        worth_R = torch.ones_like(p_RO[:, 0])
        for row, number in enumerate(given_R.tolist()):
            if number != END:
                worth_R[row] = self._go_on(p_RO[row], number, p_RV[row])
        tiny = torch.finfo(p_RV.dtype).tiny
        return (p_RV / p_RV.sum(-1, keepdim=True).clamp_min(tiny)).clamp_min(tiny).log(), worth_R

    def _go_on(self, p_O: Tensor, number: int, p_V: Tensor) -> Tensor:
        """Write (2) into p_V; returns what it is worth."""
        if number == UNKNOWN:
            return p_O.new_zeros(())
        ends, left_S, next_S = (part.to(p_O.device) for part in self.continuations[number])
        p_V.zero_().index_add_(0, next_S, p_O[left_S])
        on = p_V.sum()
        return on / (on + p_O[ends].sum()).clamp_min(torch.finfo(p_O.dtype).tiny)

    @cached_property
    def continuations(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Number of a beginning -> the original's id of the token that it is, if it is one; of the
        tokens that go on behind it; and the piece that comes next in each."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.beginnings]
        for number, pieces in self.spelled.items():
            for count in range(1, len(pieces)):
                found[self.beginnings[pieces[:count]]].append((number, pieces[count]))
        wholes = self.wholes | {(row,): number for row, number in enumerate(self.kept)}
        ends = [[wholes[pieces]] if pieces in wholes else [] for pieces in self.beginnings]
        return [
            (torch.tensor(end, dtype=torch.int64), *torch.tensor(pairs).T)
            for end, pairs in zip(ends, found, strict=True)
        ]

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The original's id of each row, (V,); of each token that left, (T,); and the row of its
        first piece."""
        firsts = [pieces[0] for pieces in self.spelled.values()]
        return torch.tensor(self.kept), torch.tensor([*self.spelled]), torch.tensor(firsts)


@dataclass(frozen=True)
class Joined:
    """Windows as the original reads them.

    Attributes:
        ids_BL: its tokens, and behind them the last one again up to the same length.
        at_C: of each prediction, where in these (flattened) its odds stand.
        given_C: the pieces that the window's token has so far: number of a beginning, END or
            UNKNOWN.
    """

    ids_BL: Tensor
    at_C: Tensor
    given_C: Tensor

    def placed(self, found_BLX: Tensor) -> Tensor:
        """What the original has at each of its tokens, at ours."""
        return found_BLX.flatten(0, 1)[self.at_C].reshape(found_BLX.shape)
