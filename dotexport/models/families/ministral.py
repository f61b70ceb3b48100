"""Ministral: Mistral in which some layers attend to a window; Ministral 3: in which queries grow.

They are multiplied with a logarithm of their position (`llama_4_scaling_beta`), behind the
rotation: no basis of the stream and no choice of heads touches that.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.mistral import MISTRAL

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
)
