"""intermediate_size: the neurons of every MLP, the same number in each layer.

Which of them stay is free in every layer. Optimal Brain Surgeon chooses, or transport merges
(merging/neurons.py), and the writer behind them is refitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dotexport.axes.axis import (
    CHOICE,
    FLOOR,
    OVER,
    InnerAxis,
    multiples,
    off_grid,
    off_group,
    steps,
)
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes

if TYPE_CHECKING:  # torch takes seconds, and sizes are planned without
    from dotexport.merging.units import Units


class IntermediateSize(InnerAxis):
    """MLP width."""

    space: ClassVar[str] = "mlp"

    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        width = self.size(before)
        found = [multiples(step, width) for step in steps(width)]
        coarsest = next((sizes for sizes in found if len(sizes) >= CHOICE), found[-1])
        return [sorted({*coarsest, width})]

    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        whole = self.size(after) == self.size(before)
        return None if whole else off_grid(self.size(after), FLOOR)

    def uneven(self, after: Sizes, devices: int) -> list[str]:
        rest = self.size(after) % devices
        return [f"{self.name} {self.size(after)} {OVER.format(devices)}"] if rest else []

    def torn(self, after: Sizes, group: int, devices: int) -> list[str]:
        return off_group(self.name, self.size(after), group * devices)

    def units(self, sizes: Sizes, space: str) -> Units:
        from dotexport.merging.neurons import Neurons

        return Neurons(sizes.spaces[space])

    def method(self, options: Any) -> str:
        return str(options.mlp)

    def story(self, record: Mapping[str, Any]) -> str:
        return f"`{record['shrink']['narrow']['mlp']}`"
