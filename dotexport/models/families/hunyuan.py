"""HunYuan (dense): Llama with norms of query and key heads behind their rotation."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.family import InnerNorm

HEAD_NORMS = (
    InnerNorm("self_attn.query_layernorm", "self_attn.q_proj"),
    InnerNorm("self_attn.key_layernorm", "self_attn.k_proj"),
)
HUNYUAN = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    sublayers=sublayers(readers="attention_bias", writer="attention_bias", inner_norms=HEAD_NORMS),
    divides=False,
    carriers=(),
)
