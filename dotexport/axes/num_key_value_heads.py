"""num_key_value_heads: whole KV groups, a KV head with the query heads that read it.

head_dim stays, because rotary frequencies depend on it. A cut shrinks the KV cache as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from dotexport.axes.axis import OVER, InnerAxis, off_group
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes

if TYPE_CHECKING:  # torch takes seconds, and sizes are planned without
    from dotexport.merging.units import Units


class NumKeyValueHeads(InnerAxis):
    """KV groups, the same number in every layer."""

    keys: ClassVar[tuple[str, ...]] = ("num_attention_heads",)
    space: ClassVar[str] = "query"

    def resized(self, sizes: Sizes, size: int) -> Sizes:
        # Where nobody has a group, as in a size that is about to be refused, queries have none.
        queries = sizes.num_attention_heads // (sizes.num_key_value_heads or 1)
        return replace(sizes, num_key_value_heads=size, num_attention_heads=queries * size)

    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        """From half of them on; at most five."""
        count = before.num_key_value_heads
        step = max(1, count // 8)
        return [[count - step * k for k in range(count // 2 // step, -1, -1)]]

    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        most = before.num_key_value_heads
        within = 1 <= after.num_key_value_heads <= most
        return None if within else f"is not between 1 and the original's {most}"

    def uneven(self, after: Sizes, devices: int) -> list[str]:
        heads, groups = after.num_attention_heads, after.num_key_value_heads
        rests = {
            f"num_attention_heads {heads}": heads % devices,
            # Fewer KV heads than devices are copied, which must come out even too.
            f"{self.name} {groups}": min(groups % devices, devices % groups),
        }
        return [f"{what} {OVER.format(devices)}" for what, rest in rests.items() if rest]

    def torn(self, after: Sizes, group: int, devices: int) -> list[str]:
        return off_group("heads x head_dim", after.spaces["query"], group)

    def units(self, sizes: Sizes, space: str) -> Units:
        from dotexport.merging.heads import Groups

        queries = sizes.num_attention_heads // sizes.num_key_value_heads
        return Groups(sizes.num_key_value_heads, queries, sizes.head_dim)

    def method(self, options: Any) -> str:
        return str(options.heads)

    def story(self, record: Mapping[str, Any]) -> str:
        return f"`{record['shrink']['narrow']['heads']}`"
