"""num_experts: whole experts of every mixture, with their rows of the router.

Those stay whose outputs count most where tokens go to them: router-weighted expert activation
pruning (REAP, arXiv 2510.13999; narrowing/experts.py). A token goes to as many experts as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dotexport.axes.axis import LEAST_SHARE, Axis
from dotexport.models.family import Family
from dotexport.models.shapes import EXPERTS, Sizes

STEPS = 16
"""Of all experts, in the grid that is searched."""


class NumExperts(Axis):
    """Experts, the same number in every layer."""

    timed: ClassVar[bool] = False

    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        count = before.num_experts
        least = max(before.num_experts_per_tok, LEAST_SHARE * count)
        sizes = range(count, 0, -max(1, count // STEPS))
        return [sorted(size for size in sizes if size >= least)]

    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        least, most = before.num_experts_per_tok, before.num_experts
        if least <= after.num_experts <= most:
            return None
        return f"is not between the {least} that each token goes to and the original's {most}"

    def config(
        self, config: Mapping[str, Any], before: Sizes, after: Sizes, kept: Sequence[int]
    ) -> dict[str, Any]:
        return {key: after.num_experts for key in EXPERTS if key in config}

    def story(self, record: Mapping[str, Any]) -> str:
        return "`reap`"
