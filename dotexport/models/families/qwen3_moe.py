"""Qwen3-MoE: the attention of Qwen3, and in the place of its MLP a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.qwen3 import QWEN3
from dotexport.models.family import Linear, Sublayer

ATTENTION, _ = QWEN3.sublayers
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sublayers=(
        ATTENTION,
        Sublayer(
            module="mlp",
            norm="post_attention_layernorm",
            readers=(
                Linear("mlp.gate", out="experts", in_="residual"),
                Linear("mlp.experts.{}.gate_proj", out="expert", in_="residual"),
                Linear("mlp.experts.{}.up_proj", out="expert", in_="residual"),
            ),
            writer=Linear("mlp.experts.{}.down_proj", out="residual", in_="expert"),
        ),
    ),
    gated="mlp.experts.{}.gate_proj",
    head_dim=None,
    num_key_value_heads=4,
    refused=(("mlp_only_layers", "has dense layers among the sparse ones"),),
    experts_key="num_experts",
)
