"""How far a narrowed model is from the original: KL divergence of what their heads say.

Shapes: N windows, L tokens per window, T tokens, D width of a stream, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from dotexport.models.layers import Stock
from dotexport.narrowing.streams import Streams

JUDGED = 8192  # held-out tokens of each kind
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


def costs_of(streams: Streams, theirs: Head, ours: Head) -> list[Cost]:
    """What narrowing cost on held-out windows of the calibration's kind, and of the other kind
    where there is one.

    Args:
        theirs, ours: of the original and of the narrowed model, whose streams have come to them.
    """
    judges = streams.judging or streams.held_out or {0}
    kinds = (judges - streams.other or {0}, judges & streams.other)
    judged = -(-JUDGED // streams.windows_NL.shape[1])
    return [_cost(streams, theirs, ours, sorted(some)[:judged]) for some in kinds if some]


def _cost(streams: Streams, theirs: Head, ours: Head, windows: Sequence[int]) -> Cost:
    sums_2 = torch.zeros(2, dtype=torch.float64)
    for place in streams.places(windows):
        rows = slice(place, place + 1)
        weights_NL = streams.weights(rows)
        [found] = compared(
            (theirs, streams.original(rows)[0]),
            [(ours, streams.narrowed(rows)[0])],
            streams.tokens(rows)[0],
            None if weights_NL is None else weights_NL[0],
        )
        sums_2 += torch.tensor(found, dtype=torch.float64)
    streams.processes.sum(sums_2)
    divergence, surprise = sums_2.tolist()
    length = streams.windows_NL.shape[1]
    predicted = max(len(windows) * (length - 1), 1)
    return Cost(divergence / (len(windows) * length), math.exp(min(surprise / predicted, 700.0)))


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
