"""Sizes whose rows fill groups of weights: what there is to take where a target asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dotexport.axes import axes_of
from dotexport.axes.axis import Axis
from dotexport.axes.plan import Plan, read_model
from dotexport.errors import DotexportError
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes

ROUNDED_TOGETHER = 32
"""Weights of a row that share a scale in the integer formats of most runtimes."""


def newly_torn(decided: Plan) -> list[str]:
    """A sentence for each width that filled groups of 32 before, and does so no more."""
    return [
        f"{text}, by which gguf, mlx and openvino round rows to integers: such matrices stay in 16 "
        "bits there; `dotexport plan MODEL --target NAME:PRECISION` finds sizes that fit"
        for axis in axes_of(decided.after)
        if not axis.torn(decided.before, ROUNDED_TOGETHER, 1)
        for text in axis.torn(decided.after, ROUNDED_TOGETHER, 1)
    ]


def advice(config: Mapping[str, Any], group: int) -> str:
    """What to do about rows that end inside a group: the flags of shrink that give the largest full
    sizes, or that there are none."""
    try:
        family, before = read_model(config)
    except DotexportError:
        return "this model cannot be narrowed to others"
    after, torn = largest_full(family, before, group)
    if torn:
        return f"narrowing cannot fill rows of {group}: {'; '.join(torn)} at every smaller size too"
    if after == before:
        return f"multiples of {group} are full, as the original's sizes are"
    flags = " ".join(
        f"--{axis.flag.replace('_', '-')} {axis.size(after)}"
        for axis in axes_of(before)
        if axis.size(after) != axis.size(before)
    )
    return f"narrowed from its original by `dotexport shrink MODEL {flags}`, rows are full"


def largest_full(family: Family, before: Sizes, group: int) -> tuple[Sizes, list[str]]:
    """The largest sizes whose rows are full, and the rows that no legal size of an axis fills."""
    after, torn = before, list[str]()
    for axis in sorted(axes_of(before), key=lambda axis: bool(axis.depends)):
        legal = (size for size in range(axis.size(before), 0, -1))
        full = next((s for s in legal if _fits(axis, family, before, after, s, group)), None)
        if full is None:
            torn += axis.torn(after, group, 1)
        else:
            after = axis.resized(after, full)
    return after, torn


def _fits(axis: Axis, family: Family, before: Sizes, after: Sizes, size: int, group: int) -> bool:
    resized = axis.resized(after, size)
    return not axis.torn(resized, group, 1) and axis.problem(family, before, resized) is None
