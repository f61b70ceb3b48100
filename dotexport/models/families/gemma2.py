"""Gemma 2: Llama with a second norm behind each sublayer, which scales what is added by axis.

Norms multiply by 1 + weight, and the embedding by the root of its width. Caps of scores and logits,
the scale of scores and windows of every other layer stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.family import Family, Sublayer

BIDIRECTIONAL = ("use_bidirectional_attention", "attends to later tokens too")


def between_norms(attention: Sublayer, mlp: Sublayer) -> tuple[Sublayer, Sublayer]:
    """Both sublayers with the norms of Gemma around them."""
    return (
        replace(attention, output_norm="post_attention_layernorm"),
        replace(
            mlp,
            norm="pre_feedforward_layernorm",
            output_norm="post_feedforward_layernorm",
        ),
    )


GEMMA2: Family = replace(
    LLAMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    sublayers=between_norms(*sublayers(readers="attention_bias", writer="attention_bias")),
    divides=True,
    carriers=(),
    windows=True,
    head_dim=256,
    tied_by_default=True,
    unit_offset=True,
    scaled_embedding=True,
    refused=(BIDIRECTIONAL,),
    num_key_value_heads=4,
)
