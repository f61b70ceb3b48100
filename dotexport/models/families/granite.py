"""Granite: Llama with a multiplier each for embedding, sublayers, attention scores and logits.

All but that of the scores are folded into the weights before anything else (models/carriers.py).
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    divides=False,
    carriers=(),
)
