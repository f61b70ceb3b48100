"""Seed-OSS: Llama with a flag of its own for the bias of the attention's writer."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers

SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    sublayers=sublayers(readers="attention_bias", writer="attention_out_bias", mlp="mlp_bias"),
    divides=False,
    carriers=("LlamaForCausalLM", "GraniteForCausalLM"),
    head_dim=128,
    num_key_value_heads=8,
)
