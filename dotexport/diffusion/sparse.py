"""Zeros instead of smaller layers: SparseGPT's sweep over columns, unstructured or N of M.

Zeros alone save neither time nor bytes in ONNX Runtime or torch; they pay only on hardware and
kernels made for them (2:4 on NVIDIA tensor cores).

After Frantar and Alistarh 2023 (arXiv 2301.00774): with U the upper Cholesky factor of H^-1, column
i is left with the error (w_i - w'_i) / U_ii, which the columns after it take over along U_i,:.

Shapes: I inputs of a layer, O outputs, B columns of one block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dotexport.errors import UsageError

BLOCK = 128


@dataclass(frozen=True)
class Pattern:
    """`share` of all weights is zero, or `zeros` of every `of` neighbours in a row."""

    share: float
    zeros: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `0.5`, `2:4` (two of four stay) or `4:8`.

        >>> Pattern.parse("2:4")
        Pattern(share=0.5, zeros=2, of=4)

        Raises:
            UsageError: neither.
        """
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            stay, of = int(found[1]), int(found[2])
            if 0 < stay < of and of <= BLOCK and BLOCK % of == 0:
                return cls(1 - stay / of, of - stay, of)
        elif re.fullmatch(r"0?\.\d+|0", text):
            return cls(float(text))
        raise UsageError(
            f"--sparsity {text} cannot be read; expected a share of zeros such as 0.5, or N:M with "
            "N weights left of every M, such as 2:4 or 4:8"
        )


def sweep(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern) -> Tensor:
    """Weights with zeros, the ones that stay refitted column after column (H is damped)."""
    weight_OI = weight_OI.double().clone()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    for first in range(0, weight_OI.shape[1], BLOCK):
        part = slice(first, min(first + BLOCK, weight_OI.shape[1]))
        block_OB, upper_BB = weight_OI[:, part], upper_II[part, part]
        errors_OB = _sweep_block(block_OB, upper_BB, pattern)
        weight_OI[:, part.stop :] -= errors_OB @ upper_II[part, part.stop :]
    return weight_OI


def _sweep_block(block_OB: Tensor, upper_BB: Tensor, pattern: Pattern) -> Tensor:
    """Put zeros into a block in place; the errors that later blocks must take over."""
    size = block_OB.shape[1]
    gone_OB = torch.zeros_like(block_OB, dtype=torch.bool)
    if not pattern.of:
        gone_OB = _cheapest(_costs(block_OB, upper_BB.diagonal()), pattern.share)
    errors_OB = torch.zeros_like(block_OB)
    for i in range(size):
        if pattern.of and i % pattern.of == 0:
            part = slice(i, min(i + pattern.of, size))
            cost_OM = _costs(block_OB[:, part], upper_BB.diagonal()[part])
            zeros = min(pattern.zeros, cost_OM.shape[1])
            gone_OB[:, part].scatter_(1, cost_OM.argsort(stable=True, dim=1)[:, :zeros], True)
        error_O = torch.where(gone_OB[:, i], block_OB[:, i], 0.0) / upper_BB[i, i]
        block_OB[:, i + 1 :] -= torch.outer(error_O, upper_BB[i, i + 1 :])
        errors_OB[:, i] = error_O
    block_OB[gone_OB] = 0.0
    return errors_OB


def _costs(weight_OB: Tensor, diagonal_B: Tensor) -> Tensor:
    return weight_OB.square() / diagonal_B.square()


def _cheapest(cost_OB: Tensor, share: float) -> Tensor:
    """The cheapest `share` of a block, over all its rows together."""
    gone_OB = torch.zeros(cost_OB.shape, dtype=torch.bool)
    count = round(share * cost_OB.numel())
    gone_OB.view(-1)[cost_OB.flatten().argsort(stable=True)[:count]] = True
    return gone_OB
