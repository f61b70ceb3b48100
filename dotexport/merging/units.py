"""Units inside a sublayer that can leave: what a sublayer asks of neurons and of KV groups alike.

Shapes: N inputs of the writer, O its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from dotexport.merging.ot.coupling import Coupling, Summary
from dotexport.merging.refit import Moments
from dotexport.merging.transport_options import TransportOptions


class Choice(Protocol):
    """Units that stay, and what they take over from those that leave."""

    kept: Tensor
    """Inputs of the writer that stay, ascending."""

    moved: float
    """Share of the importance of what leaves that something kept takes over."""

    def rows(self, space: str, rows_NX: Tensor) -> Tensor:
        """New rows of a reader that writes into `space`."""
        ...

    def stays(self, space: str) -> Tensor:
        """Features of `space` that stay as they are."""
        ...


class Units(Protocol):
    """All units of one sublayer."""

    @property
    def count(self) -> int: ...

    @property
    def width(self) -> int:
        """Inputs of the writer that belong to one unit."""
        ...

    @property
    def tokenwise(self) -> bool:
        """Whether what they give at a token depends on that token alone."""
        ...

    def choose(self, method: str, moments: Moments, writer_ON: Tensor, count: int) -> Tensor:
        """Indices of the `count` units that stay, ascending."""
        ...

    def alone(self, kept: Tensor) -> Any:
        """The `Choice` of these units as they are."""
        ...

    def merges(
        self,
        moments: Moments,
        writer_ON: Tensor,
        kept: Tensor,
        options: TransportOptions,
        keys_NN: Tensor | None,
    ) -> tuple[Coupling | Summary, Iterable[Any]]:
        """The transport of all units onto the kept ones, and choices from strict to loose.

        Args:
            keys_NN: second moment of the keys before rotation, where a sublayer has any.
        """
        ...
