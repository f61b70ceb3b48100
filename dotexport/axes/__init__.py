"""The axes along which a model can be made smaller: one file each, and one line here.

Their order is that of tables and reports. What stands in a file beside this one, and nowhere else:
its sizes, which numbers of config.json it changes, how its units are chosen, what stays exact.
"""

from __future__ import annotations

from dotexport.axes.axis import Axis, InnerAxis
from dotexport.axes.hidden_size import HiddenSize
from dotexport.axes.intermediate_size import IntermediateSize
from dotexport.axes.moe_intermediate_size import MoeIntermediateSize
from dotexport.axes.num_experts import NumExperts
from dotexport.axes.num_hidden_layers import NumHiddenLayers
from dotexport.axes.num_key_value_heads import NumKeyValueHeads
from dotexport.models.shapes import Sizes

AXES: list[Axis] = [
    HiddenSize(
        name="hidden_size",
        flag="hidden",
        label="hidden",
        help="Residual width (hidden_size).",
        weight=4.0,
        exact="a full-width basis changes nothing; a stream that lies in K axes stays what it was",
    ),
    IntermediateSize(
        name="intermediate_size",
        flag="intermediate",
        label="intermediate",
        help="MLP width (intermediate_size).",
        weight=1.0,
        exact="neurons that are copies of one another merge without a trace",
    ),
    NumKeyValueHeads(
        name="num_key_value_heads",
        flag="kv_heads",
        label="KV heads",
        help="KV heads (num_key_value_heads); their query heads leave with them.",
        weight=1.5,
        exact="groups whose output others give as well leave without a trace",
    ),
    NumExperts(
        name="num_experts",
        flag="experts",
        label="experts",
        help="Experts of every mixture (num_experts); a token goes to as many as before.",
        weight=1.0,
        exact="experts that no token goes to leave without a trace where gates sum to 1",
    ),
    MoeIntermediateSize(
        name="moe_intermediate_size",
        flag="expert_width",
        label="expert width",
        help="Width of every expert (moe_intermediate_size).",
        weight=1.0,
        exact="neurons that the others of their expert give as well leave without a trace",
    ),
    NumHiddenLayers(
        name="num_hidden_layers",
        flag="layers",
        label="layers",
        help="Layers (num_hidden_layers); which ones leave is measured.",
        weight=21.0,
        exact="layers that add nothing leave without a trace",
    ),
]


def cutting(sizes: Sizes, space: str) -> InnerAxis | None:
    """The axis that cuts a space inside sublayers, or what that is a multiple of."""
    followed = {own: size for own, size, _ in sizes.following}.get(space)
    inner = (axis for axis in AXES if isinstance(axis, InnerAxis))
    return next((axis for axis in inner if axis.space == space or axis.name == followed), None)


def axes_of(sizes: Sizes) -> list[Axis]:
    """Those that a model of these sizes has."""
    return [axis for axis in AXES if axis.size(sizes)]
