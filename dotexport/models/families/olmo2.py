"""OLMo 2: no norm in front of readers; what is added to the stream is normalised.

So are all queries and all keys together.
The gammas of these norms are fitted anew where heads leave.
"""

from __future__ import annotations

from dataclasses import replace

from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.family import InnerNorm

WIDE_NORMS = (
    InnerNorm("self_attn.q_norm", "self_attn.q_proj", per_head=False),
    InnerNorm("self_attn.k_norm", "self_attn.k_proj", per_head=False),
)
ATTENTION, MLP = sublayers(
    readers="attention_bias", writer="attention_bias", inner_norms=WIDE_NORMS
)

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    sublayers=(
        replace(ATTENTION, norm=None, output_norm="post_attention_layernorm"),
        replace(MLP, norm=None, output_norm="post_feedforward_layernorm"),
    ),
    divides=False,
    carriers=(),
)
