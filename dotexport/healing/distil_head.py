"""The last step of two models that predict the same tokens, and KL between them, without logits.

Hidden states become logits a chunk of rows at a time, of both models at once, and what is left of
a chunk is its share of the loss and of the gradients. Nothing is computed twice: the gradient is
made on the way there, because it is the difference of the two distributions.

Where tokens left, the original predicts some that the narrowed model does not have; which of its
pieces that makes likely is then asked of `Given` (vocabulary/joining.py).

Shapes: C predictions, R rows of a chunk, D width of the original, K of the narrowed model,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from dotexport.vocabulary.joining import UNKNOWN, Spellings

CHUNK_BYTES = 64 << 20  # of a chunk's logits in the dtype of the products
# Of float32 logits that are worked on together: on a CPU as many as its caches hold.
BLOCK_BYTES = {"cpu": 4 << 20}


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: a table, a divisor (Granite), and a cap (Gemma 2)."""

    table_VK: Tensor
    scaling: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """That of a stock model, which has no biases."""
        config = model.config
        return cls(
            model.get_output_embeddings().weight,
            float(getattr(config, "logits_scaling", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, hidden_CK: Tensor) -> Tensor:
        """(C, V), in float32 at least."""
        return self._shaped(_wide(hidden_CK @ self.table_VK.T))

    def _shaped(self, products_CV: Tensor) -> Tensor:
        scaled_CV = products_CV / self.scaling if self.scaling != 1 else products_CV
        return scaled_CV if self.cap is None else self.cap * torch.tanh(scaled_CV / self.cap)

    def log_probabilities(self, products_CV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of products with the table; and, where it is not 1, how fast logits grow with these."""
        logits_CV = self._shaped(_wide(products_CV))
        slope_CV = None
        if self.cap is not None:
            slope_CV = (1 - (logits_CV / self.cap).square()) / self.scaling
        elif self.scaling != 1:
            slope_CV = logits_CV.new_full((), 1 / self.scaling)
        return log_softmax(logits_CV, -1), slope_CV


@dataclass(frozen=True)
class Given:
    """What pieces the original's predictions make likely.

    Attributes:
        given_C: as `Joined.given_C`.
    """

    spellings: Spellings
    given_C: Tensor

    def __getitem__(self, rows: slice) -> Given:
        return Given(self.spellings, self.given_C[rows])

    def odds(self, log_p_CO: Tensor) -> Tensor:
        """Of the original's log-probabilities, (C, O), those of pieces, (C, V)."""
        return self.spellings.odds(log_p_CO.exp(), self.given_C)

    @property
    def known(self) -> Tensor:
        """Predictions that count, (C,), on the host: of the others nothing is known."""
        return self.given_C != UNKNOWN


def divergence(
    ours_CK: Tensor, theirs_CD: Tensor, ours: Head, theirs: Head, given: Given | None = None
) -> Tensor:
    """Mean over predictions of KL(theirs || ours), in nats, from states behind the last norm.

    Gradients flow into our hidden states and our table.

    Args:
        given: where the original's tokens are others.
    """
    apply: Any = _Divergence.apply
    total: Tensor = apply(ours_CK, ours.table_VK, theirs_CD, ours, theirs, given)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ours_CK: Tensor,
        table_VK: Tensor,
        theirs_CD: Tensor,
        ours: Head,
        theirs: Head,
        given: Given | None,
    ) -> Tensor:
        C, V = len(ours_CK), max(len(table_VK), len(theirs.table_VK))
        gradient_CK = torch.empty_like(ours_CK)
        # Sums of many chunks: bfloat16 would lose the later ones.
        gradient_VK = _wide(torch.zeros_like(table_VK))
        total = torch.zeros((), dtype=torch.float64, device=ours_CK.device)
        for rows in slices(C, CHUNK_BYTES // (V * ours_CK.element_size())):
            products_RV = ours_CK[rows] @ table_VK.T
            targets_RV = theirs_CD[rows] @ theirs.table_VK.T
            some = given and given[rows]
            for block in slices(len(products_RV), _block_rows(V, ours_CK.device)):
                total += _turn_into_gradient(
                    products_RV[block], targets_RV[block], ours, theirs, some and some[block]
                )
            gradient_CK[rows] = products_RV @ table_VK
            gradient_VK += products_RV.T @ ours_CK[rows]
        ctx.save_for_backward(gradient_CK.div_(C), gradient_VK.div_(C).to(table_VK.dtype))
        return (total / C).to(_wide(ours_CK[:0]).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient_CK, gradient_VK = ctx.saved_tensors
        return gradient_CK * scale, gradient_VK * scale, None, None, None, None


def _turn_into_gradient(
    products_RV: Tensor, targets_RV: Tensor, ours: Head, theirs: Head, given: Given | None
) -> Tensor:
    """Summed KL(theirs || ours) of these rows; its gradient takes the place of our products.

    With p theirs and q ours, d KL / d logits = q - p.
    """
    log_p_RV, _ = theirs.log_probabilities(targets_RV)
    log_q_RV, slope_RV = ours.log_probabilities(products_RV)
    if given is not None:
        log_p_RV = given.odds(log_p_RV)
    p_RV = log_p_RV.exp()
    gaps_RV = log_p_RV.sub_(log_q_RV).mul_(p_RV)
    gradient_RV = log_q_RV.exp_().sub_(p_RV)
    if given is not None:
        known_R1 = given.known[:, None].to(p_RV.device)
        gaps_RV, gradient_RV = (part.mul_(known_R1) for part in (gaps_RV, gradient_RV))
    summed = gaps_RV.sum()
    products_RV.copy_(gradient_RV if slope_RV is None else gradient_RV.mul_(slope_RV))
    return summed


def slices(count: int, size: int) -> Iterator[slice]:
    """One behind another, of `size` at most and 1 at least."""
    size = max(1, size)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _block_rows(vocabulary: int, device: torch.device) -> int:
    return BLOCK_BYTES.get(device.type, CHUNK_BYTES) // (4 * vocabulary)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or what is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
