"""Granite 4: layers of a state space (Mamba 2) or of attention, each with an MLP whose gate and up
are one matrix; in its mixtures that is an expert that all tokens go to, beside those of a router.

A state space (Dao and Gu, arXiv 2405.21060) has mamba_expand * hidden_size channels, and its class
insists on that. So hidden_size stays with them. Where all layers attend a dense one is Granite with
that matrix in two, which it is written as, and the width is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.errors import UnsupportedModelError
from dotexport.models.families.granite import EXPERTS, GRANITE, GRANITE_MOE
from dotexport.models.families.llama import sublayers
from dotexport.models.family import Linear, Shared, Sublayer, Untouched
from dotexport.models.rope import stock_config

MIXED = "channels+state+state"
STATE_SPACE = Sublayer(
    module="mamba",
    norm="input_layernorm",
    readers=(Linear("mamba.in_proj", out=f"channels+{MIXED}+state_heads", in_="residual"),),
    writer=Linear("mamba.out_proj", out="residual", in_="channels"),
    untouched=(
        Untouched("mamba.conv1d.weight", (MIXED, 1, "kernel")),
        Untouched("mamba.conv1d.bias", (MIXED,)),
        Untouched("mamba.dt_bias", ("state_heads",)),
        Untouched("mamba.A_log", ("state_heads",)),
        Untouched("mamba.D", ("state_heads",)),
        Untouched("mamba.norm.weight", ("channels",)),
    ),
)
ATTENTION, _ = sublayers(readers="attention_bias", writer="attention_bias")
MLP = Sublayer(
    module="shared_mlp",
    norm="post_attention_layernorm",
    readers=(Linear("shared_mlp.input_linear", out="mlp+mlp", in_="residual"),),
    writer=Linear("shared_mlp.output_linear", out="residual", in_="mlp"),
)
MIXTURE = replace(
    EXPERTS,
    shared=Shared(
        inner=(Linear("shared_mlp.input_linear", out="shared+shared", in_="residual"),),
        writer=Linear("shared_mlp.output_linear", out="residual", in_="shared"),
    ),
)
# What a step may be, in files of transformers 5: nothing is cut off.
ANY_STEP = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])


def as_built(config: Mapping[str, Any]) -> dict[str, Any]:
    """With words that releases of transformers and other readers have different defaults for.

    Raises:
        UnsupportedModelError: words that make a model of it that there is no table for.
    """
    words = dict(config)
    steps = words.pop("time_step_limit", None)
    if steps is not None and steps not in ANY_STEP:
        raise _unsupported(f"time_step_limit = {steps}", "is computed by transformers 5 alone")
    try:
        stock = stock_config(words)
    except Exception:  # check_class says what is wrong with it
        return words
    rotates = stock.position_embedding_type == "rope"
    kinds = stock.layer_types or ["mamba"]  # 4.57, which is refused later, derives them elsewhere
    if not stock.mamba_conv_bias:
        raise _unsupported("mamba_conv_bias = false", "has convolutions without biases")
    if not (rotates or {"linear_attention", "mamba"} & set(kinds)):
        raise _unsupported("layers that all attend, and none that rotates", "knows no positions")
    if not stock.shared_intermediate_size:
        raise _unsupported("shared_intermediate_size = 0", "has an MLP of no neurons in each layer")
    built = {
        "position_embedding_type": "rope" if rotates else "nope",
        "shared_intermediate_size": stock.shared_intermediate_size,
        "intermediate_size": stock.intermediate_size,
    }
    if stock.num_local_experts:
        built |= {key: getattr(stock, key) for key in ("num_local_experts", "num_experts_per_tok")}
    else:  # what reads no other word for the width of its MLP
        built["intermediate_size"] = stock.shared_intermediate_size
    return words | built


def _unsupported(words: str, meaning: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json gives {words}, with which GraniteMoeHybridForCausalLM {meaning}; dotexport "
        "narrows models of Granite 4 as they are published"
    )


DENSE = replace(
    GRANITE,
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    sublayers=(STATE_SPACE, ATTENTION, MLP),
    gated="shared_mlp.input_linear",
    kinds=(("mamba", (STATE_SPACE, MLP)), ("attention", (ATTENTION, MLP))),
    newer_kinds=(("linear_attention", "mamba"), ("full_attention", "attention")),
    spaces=(
        ("channels", ("mamba_expand", "hidden_size")),
        ("state", ("mamba_n_groups", "mamba_d_state")),
        ("state_heads", ("mamba_n_heads",)),
        ("kernel", ("mamba_d_conv",)),
    ),
    stays=(("hidden_size", "would narrow the channels of state spaces too"),),
    carriers=("GraniteForCausalLM",),
    release=5,
    mlp_key="shared_intermediate_size",
    as_built=as_built,
    refused=(("mamba_proj_bias", "has state spaces with biases"),),
)
GRANITE_HYBRID_MIXTURE = replace(
    DENSE,
    sublayers=(STATE_SPACE, ATTENTION, MIXTURE),
    gated=GRANITE_MOE.gated,
    kinds=(("mamba", (STATE_SPACE, MIXTURE)), ("attention", (ATTENTION, MIXTURE))),
    spaces=(*DENSE.spaces, ("shared", ("shared_intermediate_size",))),
    carriers=(),
    stays=(
        ("hidden_size", "would not fit mamba_n_heads * mamba_d_head, on which its class insists"),
    ),
    mlp_key="intermediate_size",
    experts_key=GRANITE_MOE.experts_key,
    stacks=GRANITE_MOE.stacks,
)
GRANITE_HYBRID = replace(DENSE, mixture=GRANITE_HYBRID_MIXTURE)
