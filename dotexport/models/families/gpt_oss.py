"""gpt-oss: layers that attend to a window and to everything by turns, and experts with biases.

Each query head has a sink, a score that stands beside those of the keys and takes its share of the
attention; it leaves with its head. Experts are kept together in files, gates and ups row by row in
turns. A softmax over the chosen experts is what a softmax over all of them gives where the gates of
a token are made to sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.errors import CheckpointError
from dotexport.models.families.llama import LLAMA, sublayers
from dotexport.models.families.qwen3_moe import mixture
from dotexport.models.family import ALWAYS, HEADS, Untouched
from dotexport.models.rope import stock_config
from dotexport.models.stacks import Stack

# Words whose defaults are this class's own.
OWN = ("attention_bias", "layer_types", "sliding_window", "swiglu_alpha", "swiglu_limit")
PART = "partial_rotary_factor"

ATTENTION, _ = sublayers(readers="attention_bias", writer="attention_bias")
EXPERT = "mlp.experts.{}"
STACKS = (
    Stack(
        "mlp.experts.gate_up_proj",
        (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
        interleaved=True,
        transposed=True,
    ),
    Stack(
        "mlp.experts.gate_up_proj_bias",
        (f"{EXPERT}.gate_proj.bias", f"{EXPERT}.up_proj.bias"),
        interleaved=True,
    ),
    Stack("mlp.experts.down_proj", (f"{EXPERT}.down_proj.weight",), transposed=True),
    Stack("mlp.experts.down_proj_bias", (f"{EXPERT}.down_proj.bias",)),
)


def as_built(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what the class takes for granted and other readers do not.

    Raises:
        CheckpointError: heads that are rotated in part, on which the class fails.
    """
    try:
        stock = stock_config(config)
    except Exception:  # check_class says what is wrong with it
        return dict(config)
    full = stock.to_dict()
    own = {key: full[key] for key in OWN if key in full}
    scaled = full.get("rope_scaling") or {"rope_type": "default"}  # before transformers 5
    rope = full.get("rope_parameters") or {"rope_theta": full.get("rope_theta"), **scaled}
    if (part := rope.get(PART, full.get(PART))) not in (None, 1.0):
        raise CheckpointError(
            f"config.json gives {PART} = {part}, and this class rotates whole heads; take the "
            "config.json that belongs to these weights"
        )
    own |= {} if config.get("rope_scaling") else {"rope_parameters": rope}
    return {**config, **{key: value for key, value in own.items() if config.get(key) is None}}


GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    sublayers=(
        replace(ATTENTION, untouched=(Untouched("self_attn.sinks", (HEADS,)),)),
        mixture(
            "mlp",
            router="router",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            neurons="mlp",
            bias=ALWAYS,
        ),
    ),
    gated=f"{EXPERT}.gate_proj",
    divides=False,
    windows=True,
    carriers=(),
    head_dim=64,
    num_key_value_heads=8,
    experts_key="num_local_experts",
    stacks=STACKS,
    clamped=(1.702, 7.0),
    epsilon_stays=True,  # runtimes have 1e-5 in their code for this class
    as_built=as_built,
)
