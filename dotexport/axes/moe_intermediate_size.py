"""moe_intermediate_size: the neurons of every expert, the same number in each.

Which of them stay is free in every expert, and chosen on the tokens that go to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dotexport.axes.intermediate_size import IntermediateSize


class MoeIntermediateSize(IntermediateSize):
    """Width of an expert, in classes where that is a number of its own."""

    timed: ClassVar[bool] = False
    space: ClassVar[str] = "expert"

    def story(self, record: Mapping[str, Any]) -> str:
        """Nothing is merged in an expert."""
        return "`select`" if record["shrink"]["narrow"]["mlp"] == "select" else "`obs`"
