"""How much healing computes at once, and what it computes twice for want of memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dotexport.models.memory import free_bytes, head_width

# Of the activations of one pass, which decides how many windows run at once. Not a share of what is
# free: pieces of other sizes add up in another order, and a run that goes on would differ.
PASS_BYTES = {"cpu": 768 << 20, "cuda": 16 << 30}
MEMORY_SHARE = 0.5  # of free memory that activations may take before they are computed twice


def windows_at_once(config: Any, length: int, passes: torch.dtype, device: torch.device) -> int:
    """How many windows of a batch one pass takes; the gradients of all are added up."""
    each = activation_bytes(config, length, passes)
    return max(1, PASS_BYTES[device.type] // each)


def needs_recomputing(
    model: Any,
    windows: int,
    length: int,
    passes: torch.dtype = torch.float32,
    processes: int = 1,
) -> bool:
    """Whether the activations of so many windows would take too much of the memory that will be
    free."""
    # Gradients, two moments and a copy to evaluate are still to come, in float32.
    to_come = 16 * sum(parameter.numel() for parameter in model.parameters()) // processes
    free = free_bytes(model.device) - to_come
    return bool(activation_bytes(model.config, windows * length, passes) > MEMORY_SHARE * free)


def activation_bytes(config: Any, tokens: int, passes: torch.dtype = torch.float32) -> int:
    """About what the layers keep for the backward pass.

    Per token and layer: the stream in and around both norms, queries, keys, values and what
    attention makes of them, and gate, up, their product and the nonlinearity in between. Norms are
    computed in float32 in any case.
    """
    heads = config.num_attention_heads + (getattr(config, "num_key_value_heads", None) or 0)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    neurons = width * (getattr(config, "num_experts_per_tok", None) or 1)
    neurons += getattr(config, "shared_expert_intermediate_size", None) or 0
    if getattr(config, "num_local_experts", None):
        neurons += getattr(config, "shared_intermediate_size", None) or 0
    per_layer = 4 * 4 * config.hidden_size + passes.itemsize * (
        2 * config.hidden_size + 3 * heads * head_width(config) + 4 * neurons
    )
    return int(tokens * config.num_hidden_layers * per_layer)


def recompute_layers(model: Any) -> None:
    """Gradient checkpointing: layers keep their input only and are computed again going back.

    Not transformers' own switch: that one asks for training mode, and with it comes dropout.
    """
    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
