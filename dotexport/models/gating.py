"""What lies between the readers of an expert and its writer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dotexport.models.family import Family

Gating = Callable[[Tensor, Tensor], Tensor]
"""Gate and up (T, I) -> neurons (T, I)."""


def gating_of(family: Family, config: Any) -> Gating:
    """As experts of the class have it.

    Args:
        config: the config object of transformers.
    """
    from transformers.activations import ACT2FN

    if family.clamped is None:
        activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]
        return lambda gate, up: activation(gate) * up
    alpha, limit = family.clamped
    alpha = getattr(config, "swiglu_alpha", alpha)
    limit = getattr(config, "swiglu_limit", limit)
    return lambda gate, up: clamped(gate, up, alpha=alpha, limit=limit)


def clamped(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) gate sigmoid(alpha gate), the gate at most `limit` and up within +-`limit`."""
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * (alpha * gate).sigmoid()
