"""A budget for a model that sees or hears: what its towers write into keeps its width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.axes import AXES
from dotexport.axes.plan import SizeOptions
from dotexport.models.config_words import say_once
from dotexport.models.multimodal import is_multimodal

[STREAM] = [axis for axis in AXES if axis.everywhere]
"""What towers write into, as every writer of the language model does."""


def beside_towers(stored: Mapping[str, Any], asked: SizeOptions) -> SizeOptions:
    """The same sizes, of which a budget leaves the width of the stream alone unless it is named:
    otherwise nothing would join the towers to the narrower one (`dotexport rejoin`).

    Args:
        stored: config.json as it is in the model's folder.
    """
    named = asked.axes is not None or asked.square or STREAM.name in asked.sizes
    if not asked.budgeted or named or not is_multimodal(stored):
        return asked
    say_once(
        f"{STREAM.name} stays, as the towers of this model write into its stream: what comes out "
        f"can be put back among them (dotexport rejoin); --axes with {STREAM.name} in it gives "
        "that up"
    )
    free = [axis.name for axis in AXES if axis is not STREAM and asked.may_cut(axis)]
    return replace(asked, axes=",".join(free))
