"""How much healing computes at once, and what it computes twice for want of memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from dotexport.models.memory import free_bytes

LOGITS_BYTES = 256 << 20  # of one pass's logits, which decides how many windows run at once
MEMORY_SHARE = 0.5  # of free memory that activations may take before they are computed twice


def windows_at_once(length: int, vocabulary: int) -> int:
    return max(1, LOGITS_BYTES // (4 * length * vocabulary))


def needs_recomputing(model: Any, batch: int, length: int) -> bool:
    """Whether the activations of a batch would take too much of the memory that will be free."""
    tokens = length * min(batch, windows_at_once(length, model.config.vocab_size))
    # Gradients, two moments and a copy to evaluate are still to come, in float32.
    to_come = 16 * sum(parameter.numel() for parameter in model.parameters())
    free = free_bytes(model.device) - to_come
    return bool(activation_bytes(model.config, tokens) > MEMORY_SHARE * free)


def activation_bytes(config: Any, tokens: int) -> int:
    """About what the layers keep for the backward pass, in float32.

    Per token and layer: the stream in and around both norms, queries, keys, values and what
    attention makes of them, and gate, up, their product and the nonlinearity in between.
    """
    heads = config.num_attention_heads + (getattr(config, "num_key_value_heads", None) or 0)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    per_layer = 6 * config.hidden_size + 3 * heads * head_dim + 4 * config.intermediate_size
    return int(4 * tokens * config.num_hidden_layers * per_layer)


def recompute_layers(model: Any) -> None:
    """Gradient checkpointing: layers keep their input only and are computed again going back.

    Not transformers' own switch: that one asks for training mode, and with it comes dropout.
    """
    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
