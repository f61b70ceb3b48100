"""Ministral: Mistral in which some layers attend to a window; Ministral 3: in which queries grow.

They are multiplied with a logarithm of their position (`llama_4_scaling_beta`), behind the
rotation: no basis of the stream and no choice of heads touches that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.errors import CheckpointError
from dotexport.models.families.mistral import MISTRAL

# By which queries grow with their position.
GROWING = ("llama_4_scaling_beta", "original_max_position_embeddings")


def as_built(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it is. The class fails on a text where its rotary parameters lack what its queries grow
    by, and where they turn heads in part.

    Raises:
        CheckpointError: such parameters.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise CheckpointError(
            f"config.json gives partial_rotary_factor = {part}, which Ministral 3 does not know; "
            "take the config.json that belongs to these weights"
        )
    lacking = [key for key in GROWING if rope.get(key) is None]
    if rope and lacking:
        raise CheckpointError(
            f"config.json gives rope_parameters without {' and '.join(lacking)}, by which "
            "Ministral 3 scales its queries; take the config.json that belongs to these weights"
        )
    return dict(config)


MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    refused=(),
)
MINISTRAL3 = replace(
    MINISTRAL,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    head_dim=128,
    as_built=as_built,
)
