"""Positive definite matrices, factored and inverted in their own memory.

They are as wide as an MLP, so what is made beside one of them is what narrowing must have room for.
LAPACK works in place and column by column; a symmetric matrix is its own transpose.

Shapes: I rows and columns, X right-hand sides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factored(matrix_II: Tensor) -> tuple[Tensor, Tensor]:
    """L of M = L L^T in the place of M, which is lost; and, other than zero, that M has none."""
    factor_II = matrix_II.mT
    failed = torch.empty((), dtype=torch.int32, device=matrix_II.device)
    torch.linalg.cholesky_ex(factor_II, out=(factor_II, failed))
    return factor_II, failed


def solved(factor_II: Tensor, right_IX: Tensor) -> Tensor:
    """M^-1 R in the place of R, column by column."""
    torch.linalg.solve_triangular(factor_II, right_IX, upper=False, out=right_IX)
    torch.linalg.solve_triangular(factor_II.mT, right_IX, upper=True, out=right_IX)
    return right_IX


def inverse(factor_II: Tensor) -> Tensor:
    """M^-1 in the place of its factor, which is lost."""
    return torch.cholesky_inverse(factor_II, out=factor_II)
