"""What several targets read from a config.json in the same way. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dotexport.models.rope import rope_type as type_of


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
    if kind in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return None
    default = 4096 if kind in ("mistral", "gemma2", "gemma3_text") else None
    in_layers = kind in ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
    window: int | None = config.get("sliding_window", default) if in_layers else None
    return window
