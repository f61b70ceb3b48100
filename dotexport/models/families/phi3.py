"""Phi-3: Mistral with query, key and value in one matrix, and gate and up in another.

It is written as Mistral, which has them apart.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.mistral import MISTRAL
from dotexport.models.family import Linear

ATTENTION, MLP = MISTRAL.sublayers
QKV = Linear("self_attn.qkv_proj", out="query+kv+kv", in_="residual")
GATE_UP = Linear("mlp.gate_up_proj", out="mlp+mlp", in_="residual")

PHI3 = replace(
    MISTRAL,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    sublayers=(replace(ATTENTION, readers=(QKV,)), replace(MLP, readers=(GATE_UP,))),
    gated=None,
    carriers=("MistralForCausalLM",),
    num_key_value_heads=None,
    refused=(),
)
