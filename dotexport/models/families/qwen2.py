"""Qwen2 and Qwen2.5: Llama with biases on query, key and value alone.

Many runtimes take hidden_size / heads for the width of a head of this class, so what is narrowed
is written as Llama, or as Granite where the heads do not divide the width. Layers that attend to a
window fit neither, and the model stays what it is.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.family import ALWAYS

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sublayers=sublayers(readers=ALWAYS),
    divides=False,
    windows=True,
    carriers=("LlamaForCausalLM", "GraniteForCausalLM"),
    num_key_value_heads=32,
)
