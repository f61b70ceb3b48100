"""Tokens of a model that lost some, as its original reads and predicts them.

Where a token left, smaller pieces spell it, which the original never saw beside each other: read
as they are, it denies the second behind the first. Yet it knows their odds. Joined to the token
that they spell, it reads them well, and its predictions of whole tokens p tell those of pieces:

    behind whole tokens   the sum of p over every token that begins with this piece   (1)
    within a token        the sum of p over tokens that begin with the pieces so far and this one,
                          over the same without this one                              (2)

A piece may end a token or not. The text says how often it does which, and what follows has (1) in
the one case and (2) in the other; a model that cannot tell them apart does best by the mixture of
both, which is the chain rule.

Shapes: B windows, L tokens of one, C = B * L predictions, R some of them, O rows of the original's
table, V rows that stay, T tokens that left, F entries of `within`, G of them that are asked for.
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
END, UNKNOWN = -1, -2  # behind whole tokens; within one of which the window has not the whole


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

    @cached_property
    def longest(self) -> int:
        """Pieces of a beginning, at most."""
        return max(map(len, self.beginnings), default=0)

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
        place, cut = 0, False
        while place < len(row_L):
            # What the window ends with may go on behind it.
            cut = cut or (
                len(row_L) - place <= self.longest and tuple(row_L[place:]) in self.beginnings
            )
            pieces = self._whole(row_L, place)
            for count in range(1, len(pieces)):
                at.append(max(len(ids) - 1, 0))
                given.append(self.beginnings[pieces[:count]] if ids else UNKNOWN)
            ids.append(self.wholes[pieces] if len(pieces) > 1 else self.kept[pieces[0]])
            at.append(len(ids) - 1)
            given.append(UNKNOWN if cut else END)
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

    def odds(self, p_RO: Tensor, given_R: Tensor) -> Tensor:
        """Equations (1) and (2): log-probabilities of pieces, (R, V); of UNKNOWN anything.

        Args:
            p_RO: the original's probabilities.
            given_R: `Joined.given_C`, on the host.
        """
        kept_V, left_T, first_T = self._on(p_RO.device)
        p_RV = p_RO[:, kept_V].index_add_(1, first_T, p_RO[:, left_T])
        inside_R = given_R >= 0
        if bool(inside_R.any()):
            rows, left_G, next_G = (t.to(p_RO.device) for t in self._asked(given_R, inside_R))
            p_RV[inside_R.to(p_RO.device)] = 0
            p_RV.index_put_((rows, next_G), p_RO[rows, left_G], accumulate=True)
        tiny = torch.finfo(p_RV.dtype).tiny
        return (p_RV / p_RV.sum(-1, keepdim=True).clamp_min(tiny)).clamp_min(tiny).log()

    def _asked(self, given_R: Tensor, inside_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which predictions (G,) ask for which entries of `within`, and these."""
        left_F, next_F, ends_P = self.within
        rows = inside_R.nonzero()[:, 0]
        stops, starts = ends_P[given_R[rows] + 1], ends_P[given_R[rows]]
        counts = stops - starts
        shifts = starts - (counts.cumsum(0) - counts)
        places_G = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
        return rows.repeat_interleave(counts), left_F[places_G], next_F[places_G]

    @cached_property
    def within(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each beginning, one behind another, the original's ids of the tokens that go on
        behind it, (F,); the piece that comes next in each; and where those of each beginning
        start, and the last ones end."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.beginnings]
        for number, pieces in self.spelled.items():
            for count in range(1, len(pieces)):
                found[self.beginnings[pieces[:count]]].append((number, pieces[count]))
        pairs = torch.tensor([pair for some in found for pair in some], dtype=torch.int64)
        counts = torch.tensor([0, *map(len, found)])
        return (*pairs.reshape(-1, 2).T, counts.cumsum(0))

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(part.to(device) for part in self.tables)
        return self._placed[device]

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The original's id of each row, (V,); of each token that left, (T,); and the row of its
        first piece."""
        firsts = [pieces[0] for pieces in self.spelled.values()]
        kept, left, first = (
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (self.kept, [*self.spelled], firsts)
        )
        return kept, left, first


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
