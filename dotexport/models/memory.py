"""How much memory is free, and how much of it a model may take as a whole."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from dotexport.errors import UsageError

SHARE = 0.5  # of free memory: text, activations and logits come on top
LIMIT = "DOTEXPORT_MODEL_MEMORY"  # GB that one model may take instead


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a model of so many bytes may be held there.

    Raises:
        UsageError: the limit of the environment is no number.
    """
    said = os.environ.get(LIMIT)
    if said is None:
        return num_bytes <= SHARE * free_bytes(device)
    try:
        return num_bytes <= 1e9 * float(said)
    except ValueError:
        raise UsageError(f"{LIMIT} is {said!r}; expected a number of GB, such as 4") from None


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has taken yet."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def head_width(config: Any) -> int:
    """Features of an attention head, by a class's config; of the widest, where layers differ."""
    if "head_dim" in (getattr(config, "per_layer_attributes", None) or ()):
        return max(int(layer.head_dim) for layer in config.per_layer_config)
    width: int | None = getattr(config, "head_dim", None)
    return width or int(config.hidden_size // config.num_attention_heads)
