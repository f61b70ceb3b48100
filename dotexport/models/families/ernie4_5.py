"""ERNIE 4.5 (dense): Llama whose neighbouring features of a head turn together."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers

ERNIE4_5 = replace(
    LLAMA,
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    sublayers=sublayers(readers="use_bias", writer="use_bias", mlp="use_bias"),
    divides=False,
    carriers=(),
    head_dim=128,
    num_key_value_heads=2,
    tied_by_default=True,
    rope_theta=5e5,
)
