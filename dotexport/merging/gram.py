"""Gram matrices, of which half is stored: they are the widest arrays that narrowing holds.

Shapes: T tokens, I features, P features of a panel, A features up to the last one of a panel,
S some features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 384  # columns that are multiplied at once


@dataclass(frozen=True)
class Gram:
    """Sum of z z^T over tokens, (I, I) in float64: panels of its columns, down to the diagonal.

    Attributes:
        width: I.
        terms: what is summed whenever it is asked for, each as panels (A, P): a sum of two takes
            no memory and follows both.
    """

    width: int
    terms: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> Gram:
        """In one piece of memory, which is given back as a whole."""
        shapes = [(panel.stop, panel.stop - panel.start) for panel in _panels(width)]
        sizes = [rows * columns for rows, columns in shapes]
        parts = torch.zeros(sum(sizes), dtype=torch.float64, device=device).split(sizes)
        views = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(width, (tuple(views),))

    @classmethod
    def of(cls, width: int, device: torch.device, panels: Iterable[Tensor]) -> Gram:
        """Of panels that are made one after another."""
        made = cls.zeros(width, device)
        for own_AP, panel_AP in zip(made.stored, panels, strict=True):
            own_AP.copy_(panel_AP)
        return made

    @property
    def device(self) -> torch.device:
        return self.terms[0][0].device

    @property
    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Which columns, and the columns down to the diagonal, (A, P)."""
        for panel, (first_AP, *others) in zip(
            _panels(self.width), zip(*self.terms, strict=True), strict=True
        ):
            yield panel, sum(others, first_AP)

    @property
    def stored(self) -> Iterable[Tensor]:
        """What is its own to change, where it is no sum."""
        (panels,) = self.terms
        return panels

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.width, self.terms + other.terms)

    def add(self, features_TI: Tensor) -> None:
        """Take up tokens; products are in their dtype."""
        for panel, sum_AP in zip(_panels(self.width), self.stored, strict=True):
            sum_AP += features_TI[:, : panel.stop].T @ features_TI[:, panel]

    def take(self, other: Gram, share: float) -> None:
        """Take up what is another's, every token for so many."""
        for sum_AP, more_AP in zip(self.stored, other.stored, strict=True):
            sum_AP.add_(more_AP, alpha=share)

    def diagonal(self) -> Tensor:
        return torch.cat([sum_AP[panel].diagonal() for panel, sum_AP in self.panels])

    def full(self) -> Tensor:
        """A matrix of its own, (I, I)."""
        full_II = self.terms[0][0].new_empty(self.width, self.width)
        for panel, sum_AP in self.panels:
            full_II[: panel.stop, panel] = sum_AP
            full_II[panel, : panel.stop] = sum_AP.T
        return full_II

    @property
    def last(self) -> Tensor:
        """Its last row, (I,)."""
        *_, (_, last_AP) = self.panels
        return last_AP[:, -1]

    def rows(self, some: Tensor) -> Tensor:
        """Whole rows of some features, (S, I)."""
        rows_SI = self.terms[0][0].new_empty(len(some), self.width)
        for panel, sum_AP in self.panels:
            above, inside = some < panel.stop, (some >= panel.start) & (some < panel.stop)
            rows_SI[above, panel] = sum_AP[some[above]]
            rows_SI[inside, : panel.stop] = sum_AP[:, some[inside] - panel.start].T
        return rows_SI

    def among(self, kept: Tensor) -> Gram:
        """The same sum for these features."""
        panels = (self.rows(kept[panel])[:, kept[: panel.stop]].T for panel in _panels(len(kept)))
        return Gram.of(len(kept), self.device, panels)

    def given_last(self) -> Gram:
        """What is left of the others when the last feature has explained what it can of them."""
        last_I, energy = self.last[:-1], self.last[-1].clamp_min(1e-30)
        left = (
            sum_AP[: panel.stop, : panel.stop - panel.start]
            - torch.outer(last_I[: panel.stop], last_I[panel]) / energy
            for panel, (_, sum_AP) in zip(_panels(len(last_I)), self.panels, strict=False)
        )
        return Gram.of(len(last_I), self.device, left)

    def form(self, left_OI: Tensor, right_OI: Tensor) -> Tensor:
        """tr(L G R^T), where L^T R is symmetric."""
        total = left_OI.new_zeros((), dtype=torch.float64)
        for panel, sum_AP in self.panels:
            above, own = sum_AP.split([panel.start, panel.stop - panel.start])
            said_OP = 2 * (left_OI[:, : panel.start] @ above) + left_OI[:, panel] @ own
            total += (said_OP * right_OI[:, panel]).sum()
        return total


def _panels(width: int) -> list[slice]:
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


def gram(features_TI: Tensor) -> Tensor:
    """z^T z, (I, I), in the dtype of z; symmetric, so that half of the products are enough."""
    width = features_TI.shape[1]
    gram_II = features_TI.new_empty(width, width)
    for panel in _panels(width):
        above_AP = features_TI[:, : panel.stop].T @ features_TI[:, panel]
        gram_II[: panel.stop, panel] = above_AP
        gram_II[panel, : panel.stop] = above_AP.T
    return gram_II
