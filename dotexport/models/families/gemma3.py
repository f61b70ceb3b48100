"""Gemma 3 (text): Gemma 2 with norms of query and key heads, and rotary bases by kind of layer."""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.gemma2 import GEMMA2, between_norms
from dotexport.models.families.llama import sublayers
from dotexport.models.families.qwen3 import HEAD_NORMS

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    sublayers=between_norms(
        *sublayers(readers="attention_bias", writer="attention_bias", inner_norms=HEAD_NORMS)
    ),
)
