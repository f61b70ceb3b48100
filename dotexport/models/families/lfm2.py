"""LFM2: most layers a short convolution between two gates, the others attention with norms of its
heads.

A convolution has as many channels as the stream has axes, and they are not the axes of the stream:
its reader and its writer turn one into the other. So a narrower stream asks for as many fewer
channels, which are chosen as neurons are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.errors import CheckpointError
from dotexport.models.families.llama import LLAMA
from dotexport.models.family import InnerNorm, Linear, Sublayer, Untouched
from dotexport.models.rope import stock_config

# Words that replace others, and by which the class rounds the width of its MLP.
REPLACING = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
ROUNDED = "block_auto_adjust_ff_dim"

SHORT_CONVOLUTION = Sublayer(
    module="conv",
    norm="operator_norm",
    readers=(Linear("conv.in_proj", out="channels+channels+channels", in_="residual"),),
    writer=Linear("conv.out_proj", out="residual", in_="channels"),
    untouched=(Untouched("conv.conv.weight", ("channels", 1, "kernel")),),
)
ATTENTION = Sublayer(
    module="self_attn",
    norm="operator_norm",
    readers=(
        Linear("self_attn.q_proj", out="query", in_="residual"),
        Linear("self_attn.k_proj", out="kv", in_="residual"),
        Linear("self_attn.v_proj", out="kv", in_="residual"),
    ),
    writer=Linear("self_attn.out_proj", out="residual", in_="query"),
    inner_norms=(
        InnerNorm("self_attn.q_layernorm", "self_attn.q_proj"),
        InnerNorm("self_attn.k_layernorm", "self_attn.k_proj"),
    ),
)
MLP = Sublayer(
    module="feed_forward",
    norm="ffn_norm",
    readers=(
        Linear("feed_forward.w1", out="mlp", in_="residual"),
        Linear("feed_forward.w3", out="mlp", in_="residual"),
    ),
    writer=Linear("feed_forward.w2", out="residual", in_="mlp"),
)


def as_built(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the width of the MLP that Lfm2MLP makes of what is said, and no word to round it by.

    Raises:
        CheckpointError: a width that is rounded to multiples of nothing.
    """
    try:
        stock = stock_config(config)
    except Exception:  # check_class says what is wrong with it
        return dict(config)
    width = stock.intermediate_size
    if stock.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if (factor := stock.block_ffn_dim_multiplier) is not None:
            if (multiple := stock.block_multiple_of) < 1:
                raise CheckpointError(
                    f"config.json gives block_multiple_of = {multiple}, to whose multiples the "
                    "width of the MLP is rounded; expected 1 or more"
                )
            width = -(-int(factor * width) // multiple) * multiple
    built = {
        "intermediate_size": width,
        "tie_word_embeddings": stock.tie_word_embeddings,
        ROUNDED: False,
    }
    return {key: value for key, value in config.items() if key not in REPLACING} | built


LFM2 = replace(
    LLAMA,
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    sublayers=(SHORT_CONVOLUTION, ATTENTION, MLP),
    final_norm="model.embedding_norm",
    gated="feed_forward.w1",
    kinds=(
        ("conv", (SHORT_CONVOLUTION, MLP)),
        ("full_attention", (ATTENTION, MLP)),
    ),
    spaces=(("channels", ("hidden_size",)), ("kernel", ("conv_L_cache",))),
    divides=False,
    carriers=(),
    num_key_value_heads=8,
    tied_by_default=True,
    rope_theta=1_000_000.0,
    release=5,
    epsilon_key="norm_eps",
    as_built=as_built,
    refused=(("conv_bias", "has convolutions with biases"),),
)
