"""Qwen3 (dense): Llama with a norm over the features of each query and key head.

These norms lie inside the heads, behind the projections: no basis of the residual stream and no
choice of heads touches them.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.family import InnerNorm

HEAD_NORMS = (
    InnerNorm("self_attn.q_norm", "self_attn.q_proj"),
    InnerNorm("self_attn.k_norm", "self_attn.k_proj"),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    sublayers=sublayers(
        readers="attention_bias",
        writer="attention_bias",
        inner_norms=HEAD_NORMS,
    ),
    divides=False,
    carriers=(),
    windows=True,
    head_dim=128,
    num_key_value_heads=32,
)
