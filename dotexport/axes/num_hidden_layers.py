"""num_hidden_layers: whole layers leave, wherever in the stack.

Which ones is measured (narrowing/depth.py). The last writer in front of a cut is then fitted to the
original's stream behind it, and every later one answers for what is still missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dotexport.axes.axis import LEAST_SHARE, Axis
from dotexport.models.family import Family
from dotexport.models.rope import stock_config
from dotexport.models.shapes import Sizes

DEEPER = 0.7
"""How fast the cost of a share of the layers falls with their number."""

SEARCHED = (6, 12)
"""Numbers of layers of each grid, at most."""

KINDS = ("layer_types", "no_rope_layers")


class NumHiddenLayers(Axis):
    """Depth."""

    timed: ClassVar[bool] = False

    def size(self, sizes: Sizes) -> int:
        return sizes.num_layers

    def resized(self, sizes: Sizes, size: int) -> Sizes:
        return replace(sizes, num_layers=size)

    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        """Every so many from all of them down; each grid halves the steps of the one before."""
        count = before.num_layers
        every = [size for size in range(1, count + 1) if size >= LEAST_SHARE * count]
        finest = -(-len(every) // SEARCHED[-1])
        steps = [2 * finest, finest] if len(every) > SEARCHED[0] else [finest]
        return [every[::-step][::-1] for step in steps]

    def strain(self, before: Sizes, after: Sizes) -> float:
        """Of a deep model a share of the layers costs less: 8 at 4 layers, 1.9 at 30, as measured
        against the MLP (docs/log.md)."""
        return super().strain(before, after) / math.pow(before.num_layers, DEEPER)

    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        most, least = before.num_layers, len(set(before.kinds)) or 1
        within = least <= after.num_layers <= most
        one = f"{least}, a layer of each kind," if before.kinds else "1"
        return None if within else f"is not between {one} and the original's {most}"

    def layers(self, before: Sizes, after: Sizes) -> Sequence[int]:
        """Where nothing is measured: without those in front of the last two, which gather what the
        head reads."""
        last = min(2, after.num_layers - 1)
        first = range(after.num_layers - last)
        return [*first, *range(before.num_layers - last, before.num_layers)]

    def config(
        self, config: Mapping[str, Any], before: Sizes, after: Sizes, kept: Sequence[int]
    ) -> dict[str, Any]:
        """The number, and every list that has an entry for each layer."""
        if len(kept) == before.num_layers:
            return {self.name: after.num_layers}
        changed: dict[str, Any] = {
            key: [value[layer] for layer in kept]
            for key, value in _by_layer(config).items()
            if len(value) == before.num_layers
        }
        windowed = config.get("max_window_layers")
        if isinstance(windowed, int):
            changed["max_window_layers"] = sum(layer < windowed for layer in kept)
        return {**changed, self.name: after.num_layers}

    def story(self, record: Mapping[str, Any]) -> str:
        kept = set(record.get("kept_layers") or range(record["sizes"][self.name][0]))
        left = sorted(set(range(record["sizes"][self.name][0])) - kept)
        return f"without {', '.join(map(str, left))}" if left else "not said which"


def _by_layer(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of config.json, and kinds of layers that the class derives from a layer's number."""
    lists = {key: value for key, value in config.items() if isinstance(value, list)}
    stock = stock_config(config)
    kinds = {key: list(getattr(stock, key, None) or ()) for key in KINDS}
    # Layers that are all of one kind say so without a list; some lists have entries to spare.
    mixed = {key: all_[: stock.num_hidden_layers] for key, all_ in kinds.items()}
    mixed = {key: one for key, one in mixed.items() if len(set(one)) > 1}
    said = {key: one for key, one in lists.items() if len(one) == stock.num_hidden_layers}
    return lists | mixed | said
