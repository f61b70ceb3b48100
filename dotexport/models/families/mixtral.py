"""Mixtral: the attention of Mistral, and in the place of its MLP a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.mistral import MISTRAL
from dotexport.models.family import Linear, Sublayer

ATTENTION, _ = MISTRAL.sublayers
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sublayers=(
        ATTENTION,
        Sublayer(
            module="block_sparse_moe",
            norm="post_attention_layernorm",
            readers=(
                Linear("block_sparse_moe.gate", out="experts", in_="residual"),
                Linear("block_sparse_moe.experts.{}.w1", out="mlp", in_="residual"),
                Linear("block_sparse_moe.experts.{}.w3", out="mlp", in_="residual"),
            ),
            writer=Linear("block_sparse_moe.experts.{}.w2", out="residual", in_="mlp"),
        ),
    ),
    gated="block_sparse_moe.experts.{}.w1",
    experts_key="num_local_experts",
)
