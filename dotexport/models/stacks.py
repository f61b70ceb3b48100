"""Tensors in which a class or its files keep all experts of a layer together.

Names in a table are those of one expert. Where files keep experts apart, they are the names of
files; else each has a slot in a tensor of all of them.

Shapes: E experts, P parts that an expert has in one tensor, O rows and I columns of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dotexport.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds, and sizes are planned without
    from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """A tensor of all experts, one behind the other along its first axis.

    Attributes:
        name: below the layer.
        parts: what it has of each expert, by their names in the table; of equal shapes.
        interleaved: whether rows of the parts take turns; else the parts are behind one another.
        transposed: whether it has a matrix as (in, out).
        held: its name in memory, where the class has another there.
    """

    name: str
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    held: str | None = None

    def shape(self, experts: int, part: Sequence[int]) -> tuple[int, ...]:
        """Of the whole: (E, P O, I), or (E, I, P O) where it is transposed."""
        one = (part[0] * len(self.parts), *part[1:])
        return (experts, *(one[::-1] if self.transposed else one))

    def part(self, place: int, expert: Tensor) -> Tensor:
        """A part (O, I) as a view of what the whole has of one expert."""
        rows = expert.T if self.transposed else expert
        if self.interleaved:
            return rows[place :: len(self.parts)]
        return rows.chunk(len(self.parts))[place]


@dataclass(frozen=True)
class Slot:
    """Where a tensor of one expert lies.

    Attributes:
        whole: name of the tensor of all experts.
        stack: how that is made.
        experts: how many it has.
        expert, place: which of them, and which of its parts.
    """

    whole: str
    stack: Stack
    experts: int
    expert: int
    place: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of this part, in a whole of that shape.

        Raises:
            CheckpointError: it has no such parts.
        """
        _, *one = whole
        rows, *columns = one[::-1] if self.stack.transposed else one
        part = (rows // len(self.stack.parts), *columns)
        if self.stack.shape(self.experts, part) != tuple(whole):
            raise CheckpointError(
                f"{self.whole} has shape {tuple(whole)} where config.json says {self.experts} "
                f"experts of {len(self.stack.parts)} parts each; config and weights are not of "
                "the same model"
            )
        return part

    def whole_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        return self.stack.shape(self.experts, part)

    def of(self, expert: Tensor) -> Tensor:
        """This part as a view of what the whole has of its expert."""
        return self.stack.part(self.place, expert)
