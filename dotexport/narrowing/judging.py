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


Said = tuple[Head, Tensor]
"""A head, and the streams (T, D) in front of it."""


def divergences(original: Said, narrowed: Sequence[Said]) -> list[float]:
    """Of each of these models from the original, nats, summed over the tokens."""
    head, stream_TD = original
    totals = [0.0] * len(narrowed)
    for start in range(0, len(stream_TD), JUDGED_AT_ONCE):
        some = slice(start, start + JUDGED_AT_ONCE)
        theirs_TV = log_softmax(head.logits(stream_TD[some]), -1)
        for number, (other, other_TK) in enumerate(narrowed):
            ours_TV = log_softmax(other.logits(other_TK[some]), -1)
            totals[number] += float(kl_div(ours_TV, theirs_TV, reduction="sum", log_target=True))
    return totals
