"""How far a narrowed model is from the original: KL divergence of what their heads say.

Shapes: T tokens, D width of a stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from dotexport.models.layers import Stock

JUDGED_AT_ONCE = 256  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Head:
    """A final norm with gamma one, and the head (V, D) that has the gamma folded in."""

    stock: Stock
    table_VD: Tensor

    def logits(self, stream_TD: Tensor) -> Tensor:
        """Of the next token, (T, V), capped in classes that do so."""
        norm: Any = self.stock.norm(stream_TD.device)
        logits_TV: Tensor = norm(stream_TD) @ self.table_VD.T
        cap = getattr(self.stock.config, "final_logit_softcapping", None)
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)


@dataclass(frozen=True)
class Cost:
    """What narrowing cost on held-out windows of one kind of text.

    Attributes:
        kl: divergence from the original, nats per token.
        perplexity_ratio: perplexity over the original's.
    """

    kl: float
    perplexity_ratio: float


Said = tuple[Head, Tensor]
"""A head, and the streams (T, D) in front of it."""


def divergences(
    original: Said, narrowed: Sequence[Said], weights_T: Tensor | None = None
) -> list[float]:
    """Of each of these models from the original, nats, summed over the tokens."""
    return [kl for kl, _ in compared(original, narrowed, weights_T=weights_T)]


def compared(
    original: Said,
    narrowed: Sequence[Said],
    tokens_T: Tensor | None = None,
    weights_T: Tensor | None = None,
) -> list[tuple[float, float]]:
    """Divergence of each of these models from the original, and how much more it is surprised by
    the tokens that follow; nats, summed.

    Args:
        tokens_T: of the text that was read; nothing follows the last one. None: nothing does.
        weights_T: how much the divergence of each counts (context.py); None: all by one.
    """
    head, stream_TD = original
    totals = [(0.0, 0.0)] * len(narrowed)
    for start in range(0, len(stream_TD), JUDGED_AT_ONCE):
        some = slice(start, start + JUDGED_AT_ONCE)
        theirs_TV = log_softmax(head.logits(stream_TD[some]), -1)
        next_S = None if tokens_T is None else tokens_T[1:][some].to(theirs_TV.device)
        for number, (other, other_TK) in enumerate(narrowed):
            ours_TV = log_softmax(other.logits(other_TK[some]), -1)
            kl = _divergence(ours_TV, theirs_TV, None if weights_T is None else weights_T[some])
            excess = 0.0 if next_S is None else _surprise(ours_TV, next_S)
            excess -= 0.0 if next_S is None else _surprise(theirs_TV, next_S)
            before = totals[number]
            totals[number] = before[0] + kl, before[1] + excess
    return totals


def _divergence(ours_TV: Tensor, theirs_TV: Tensor, weights_T: Tensor | None) -> float:
    if weights_T is None:
        return float(kl_div(ours_TV, theirs_TV, reduction="sum", log_target=True))
    kl_T = kl_div(ours_TV, theirs_TV, reduction="none", log_target=True).sum(-1)
    return float(kl_T @ weights_T.to(kl_T))


def _surprise(said_TV: Tensor, next_S: Tensor) -> float:
    """Of the tokens that follow the first S of these T positions."""
    return -float(said_TV[: len(next_S)].gather(-1, next_S[:, None]).sum())
