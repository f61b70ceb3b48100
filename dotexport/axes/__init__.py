"""The axes along which a model can be made smaller: one file each, and one line here.

Their order is that of tables and reports. What stands in a file beside this one, and nowhere else:
its sizes, which numbers of config.json it changes, how its units are chosen, what stays exact.
"""

from __future__ import annotations

from dotexport.axes.axis import Axis
from dotexport.axes.hidden_size import HiddenSize
from dotexport.axes.intermediate_size import IntermediateSize
from dotexport.axes.num_hidden_layers import NumHiddenLayers
from dotexport.axes.num_key_value_heads import NumKeyValueHeads

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
    NumHiddenLayers(
        name="num_hidden_layers",
        flag="layers",
        label="layers",
        help="Layers (num_hidden_layers); which ones leave is measured.",
        weight=21.0,
        exact="layers that add nothing leave without a trace",
    ),
]
