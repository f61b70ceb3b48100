"""Mistral: Llama without biases; every layer attends to a window, where there is one."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    sublayers=sublayers(),
    divides=False,
    carriers=(),
    windows=True,
    num_key_value_heads=8,
    refused=(("layer_types", "is read by transformers as Ministral"),),
)
