"""What several targets read from a config.json in the same way. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.models.rope import rope_type as type_of
from dotexport.models.rope import stock_config

# Classes with windows, and how far back those see where config.json does not say.
WINDOWS = {
    "gemma2": 4096,
    "gemma3_text": 4096,
    "gpt_oss": 128,
    "ministral": 4096,
    "ministral3": None,
    "mistral": 4096,
    "mixtral": None,
    "phi3": None,
    "qwen2": None,
    "qwen3": None,
    "qwen3_moe": 4096,
    "smollm3": None,
}


# Kinds of layers that keep keys and values; `attention` where the others are `mamba`.
ATTENTION = {"attention", "full_attention", "sliding_attention"}


def head_dim(config: Any) -> int:
    """Features of one head."""
    heads = config.get("num_attention_heads") or 1
    return int(config.get("head_dim") or config.get("hidden_size", 0) // heads)


def rope_type(config: Any) -> str:
    """Of all layers; of kinds of layers that have their own, one that is out of the ordinary."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    types = {type_of(kind) for kind in kinds}
    return min(types - {"default"}, default="default")


def window_of(config: Any) -> int | None:
    """How far back a layer attends, where a class has a window at all."""
    kind = config.get("model_type")
    if kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3") and not config.get("use_sliding_window"):
        return None
    if "sliding_attention" not in (config.get("layer_types") or ("sliding_attention",)):
        return None
    window: int | None = config.get("sliding_window", WINDOWS[kind]) if kind in WINDOWS else None
    return window


def states_of(config: Any) -> list[str]:
    """Kinds of layers that keep another state than keys and values."""
    return sorted(set(config.get("layer_types") or ()) - ATTENTION)


def rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, factors and the like, wherever config.json has them."""
    top = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    return top | (config.get("rope_parameters") or config.get("rope_scaling") or {})


def frequencies(config: Mapping[str, Any], kind: str) -> tuple[NDArray[np.float64], float]:
    """Radians per position of every second feature of a head, and what rotated heads are multiplied
    with; `kind` is that of the rope."""
    if kind == "default":
        rope = rope_words(config)
        width = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
        return float(rope.get("rope_theta", 10000.0)) ** -(np.arange(0, width, 2) / width), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, gain = ROPE_INIT_FUNCTIONS[kind](stock_config(config), device="cpu")
    return scaled.double().numpy(), float(gain)
