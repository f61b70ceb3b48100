"""Mixtral: the attention of Mistral, and in the place of its MLP a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.mistral import MISTRAL
from dotexport.models.families.qwen3_moe import mixture

ATTENTION, _ = MISTRAL.sublayers
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sublayers=(
        ATTENTION,
        mixture("block_sparse_moe", gate="w1", up="w3", down="w2", neurons="mlp"),
    ),
    gated="block_sparse_moe.experts.{}.w1",
    experts_key="num_local_experts",
)
