"""SmolLM3: Llama in which some layers do not rotate queries and keys (`no_rope_layers`)."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    divides=False,
    windows=True,
    carriers=(),
    num_key_value_heads=4,
    tied_by_default=True,
    rope_theta=2e6,
)
