"""hidden_size: the width of the residual stream, which all norms read and all writers add to.

It is cut by one basis for the whole model (narrowing/basis.py), so there are no adapters, and a
narrower stock norm is exact by the rule of models/exact_norm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dotexport.axes.axis import CHOICE, FLOOR, Axis, multiples, off_grid, off_group, steps
from dotexport.models.exact_norm import exact_norm
from dotexport.models.families import SUPPORTED, find_carrier
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes


class HiddenSize(Axis):
    """Residual width; some classes ask for a multiple of their heads."""

    depends: ClassVar[tuple[str, ...]] = ("num_key_value_heads",)
    everywhere: ClassVar[bool] = True

    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        width = before.hidden_size
        found = [(step, multiples(step, width)) for step in steps(width)]
        heads = before.num_attention_heads if family.divides else 1
        coarse = (n for n, (step, _) in enumerate(found) if _leaves_a_choice(step, heads, width))
        first = next(coarse, len(found) - 1)
        return [sorted({*sizes, width}) for _, sizes in found[first:]]

    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        carrier = find_carrier(family, after)
        heads = after.num_attention_heads
        grain = 1 if after.hidden_size == before.hidden_size else FLOOR
        if not carrier.divides:
            return off_grid(after.hidden_size, grain)
        if after.hidden_size % math.lcm(grain, heads) == 0 < after.hidden_size:
            return None
        class_ = f" and of the {heads} attention heads ({family.architecture})"
        return f"is not a positive multiple of {FLOOR}{class_}"

    def torn(self, after: Sizes, group: int, devices: int) -> list[str]:
        return off_group(self.name, after.hidden_size, group)

    def config(
        self, config: Mapping[str, Any], before: Sizes, after: Sizes, kept: Sequence[int]
    ) -> dict[str, Any]:
        changed: dict[str, Any] = {self.name: after.hidden_size}
        if after.hidden_size != before.hidden_size:
            named = config.get("architectures") or ()
            tables = [SUPPORTED[name] for name in named if name in SUPPORTED]
            key = next((table.epsilon_key for table in tables), "rms_norm_eps")
            changed[key] = exact_norm(
                before.hidden_size,
                after.hidden_size,
                config.get(key, 1e-6),
                epsilon_stays=any(table.epsilon_stays for table in tables),
            ).epsilon
        return changed

    def story(self, record: Mapping[str, Any]) -> str:
        return f"basis `{record['basis']['method']}`"


def _leaves_a_choice(step: int, heads: int, width: int) -> bool:
    return len(multiples(math.lcm(step, heads), width)) >= CHOICE
