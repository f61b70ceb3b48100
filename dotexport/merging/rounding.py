"""Rounding that knows what goes in: GPTQ (arXiv 2210.17323) on the Gram matrix of a matrix's
inputs.

Columns are rounded one after another, and what rounding one of them leaves is taken over by those
behind it. With H = G + damping and H^-1 = U^T U, U upper triangular, an error e of column j costs
(e / U_jj)^2 of tr(E H E^T) and moves column k > j by -e U_jk / U_jj. Scales are chosen by that very
cost, group by group, when the columns in front have left their errors there.

Shapes: O outputs, I inputs; W neighbours of a row whose scales are fitted together, S numbers
stored for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DAMPING = 1e-2  # of the mean diagonal, as in GPTQ's own code
MOST_ERROR = 3.0
"""How far a row may go from its weights, in units of what rounding to nearest costs it. Inputs that
never differ in the text would otherwise let weights go anywhere."""
ROWS = 8192  # outputs at a time


@dataclass(frozen=True)
class Lattice:
    """What W neighbours of every row can be: step x level - offset.

    Attributes:
        step_OW, offset_OW: of each weight, or (O, 1) where all have one.
        stored_OS: the numbers that a file holds for it.
    """

    step_OW: Tensor
    offset_OW: Tensor
    stored_OS: Tensor


class Grid(Protocol):
    """A format of integers with scales."""

    @property
    def width(self) -> int:
        """Neighbours of a row whose scales are fitted together."""
        ...

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest."""
        ...

    def lattices(self, weights_OW: Tensor, importance_W: Tensor | None) -> Iterator[Lattice]:
        """Those worth trying.

        Args:
            importance_W: of a squared error in each column; None: all alike, and only what rounding
                to nearest takes is asked for.
        """
        ...


@dataclass(frozen=True)
class Blocks:
    """One scale for `width` neighbours and levels around zero.

    The largest entry becomes the lowest level and is exact; a smaller scale costs it and spares the
    rest. Where there is one level more below zero than above, scales have a sign.

    Attributes:
        scale: as which a scale is stored.
    """

    width: int
    levels: tuple[int, int]
    scale: torch.dtype = torch.float32
    shares: tuple[float, ...] = (1.0,)

    def lattices(self, weights_OW: Tensor, importance_W: Tensor | None) -> Iterator[Lattice]:
        low_O1, high_O1 = weights_OW.aminmax(dim=1, keepdim=True)
        largest_O1 = torch.where(high_O1 > -low_O1, high_O1, low_O1)
        for share in self.shares if importance_W is not None else (1.0,):
            scale_O1 = (largest_O1 * (share / self.levels[0])).to(self.scale)
            step_O1 = scale_O1.float()
            yield Lattice(step_O1, torch.zeros_like(step_O1), step_O1)


FOUR_BITS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, -1.15, -1.05, -0.95, -0.85)
"""Shares of the largest entry that become the lowest of 16 levels; the highest is 7, so that one
of -1.14 makes it exact, too."""
FIVE_BITS = (1.0, 0.97, 0.94, 0.91, 0.88, -1.07, -1.03, -0.99, -0.95, -0.91)
"""The same of 32 levels, whose highest is 15."""


@dataclass(frozen=True)
class Rounded:
    """A matrix in levels.

    Attributes:
        levels_OI: int8.
        stored_OGS: what is stored for each of the G groups of a row.
    """

    levels_OI: Tensor
    stored_OGS: Tensor


@dataclass(frozen=True)
class Solved:
    """A rounded matrix and how good it is.

    Attributes:
        values_OI: what its levels stand for, float32.
        loss, nearest: tr(E G E^T) over tr(W G W^T), with its rounding and with that to nearest.
    """

    rounded: Rounded
    values_OI: Tensor
    loss: float
    nearest: float


def nearest(weights_OI: Tensor, grid: Grid) -> tuple[Rounded, Tensor]:
    """Every weight to its nearest level, and the values of these, with nothing known of inputs."""
    return _walked(weights_OI.float(), None, grid)


def solve(weights_OI: Tensor, gram_II: Tensor, grid: Grid) -> Solved:
    """Rounds so that the outputs change least: no row more than with `nearest`, in outputs, nor
    more than `MOST_ERROR` times as much in its weights.

    Args:
        gram_II: sum of z z^T over the inputs z.
    """
    factor_II = inverse_factor(gram_II)
    pieces = [_solved(piece_OI, gram_II, factor_II, grid) for piece_OI in weights_OI.split(ROWS)]
    rounded, values, *sums = zip(*pieces, strict=True)
    loss, plain, energy = (float(torch.stack(part).sum()) for part in sums)
    levels_OI = torch.cat([piece.levels_OI for piece in rounded])
    stored_OGS = torch.cat([piece.stored_OGS for piece in rounded])
    energy = max(energy, 1e-30)
    return Solved(Rounded(levels_OI, stored_OGS), torch.cat(values), loss / energy, plain / energy)


def _solved(
    weights_OI: Tensor, gram_II: Tensor, factor_II: Tensor, grid: Grid
) -> tuple[Rounded, Tensor, Tensor, Tensor, Tensor]:
    weights_OI = weights_OI.float()
    found, values_OI = _walked(weights_OI, factor_II, grid)
    plain, plain_OI = nearest(weights_OI, grid)
    loss_O, plain_O = (output_error(v - weights_OI, gram_II) for v in (values_OI, plain_OI))
    far_O = moved(values_OI, weights_OI) > MOST_ERROR * moved(plain_OI, weights_OI)
    worse_O = far_O | ~(loss_O <= plain_O)
    kept = Rounded(
        torch.where(worse_O[:, None], plain.levels_OI, found.levels_OI),
        torch.where(worse_O[:, None, None], plain.stored_OGS, found.stored_OGS),
    )
    return (
        kept,
        torch.where(worse_O[:, None], plain_OI, values_OI),
        torch.where(worse_O, plain_O, loss_O).sum(),
        plain_O.sum(),
        output_error(weights_OI, gram_II).sum(),
    )


def output_error(errors_OI: Tensor, gram_II: Tensor) -> Tensor:
    """e G e^T of every row, (O,)."""
    errors_OI = errors_OI.to(gram_II.dtype)
    return ((errors_OI @ gram_II) * errors_OI).sum(1)


def moved(values_OI: Tensor, weights_OI: Tensor) -> Tensor:
    """How far each row is from its weights, (O,)."""
    distance_O: Tensor = torch.linalg.vector_norm(values_OI - weights_OI, dim=1)
    return distance_O


def inverse_factor(gram_II: Tensor, damping: float = DAMPING) -> Tensor:
    """U of (G + damping)^-1 = U^T U, upper triangular, float32."""
    damped_II = gram_II.double()
    mean = damped_II.diagonal().mean().clamp_min(1e-30)
    while True:
        shifted_II = damped_II + torch.eye(len(damped_II)).to(damped_II) * (damping * mean)
        lower_II, failed = torch.linalg.cholesky_ex(shifted_II)
        if not failed:
            break
        damping *= 10
    inverse_II = torch.cholesky_inverse(lower_II)
    factor_II: Tensor = torch.linalg.cholesky((inverse_II + inverse_II.T) / 2, upper=True)
    return factor_II.float()


def _walked(weights_OI: Tensor, factor_II: Tensor | None, grid: Grid) -> tuple[Rounded, Tensor]:
    """Group by group; without a factor, each group by itself."""
    left_IO = weights_OI.T.contiguous().clone()
    levels, values, stored = [], [], []
    for start in range(0, len(left_IO), grid.width):
        here = slice(start, min(start + grid.width, len(left_IO)))
        factor_WW = None if factor_II is None else factor_II[here, here]
        best = _best(left_IO[here], factor_WW, grid)
        if factor_II is not None:
            left_IO[here.stop :].addmm_(factor_II[here, here.stop :].T, best.errors_WO, alpha=-1)
        levels.append(best.levels_WO.T)
        values.append(best.values_WO.T)
        stored.append(best.stored_OS)
    rounded = Rounded(torch.cat(levels, 1).to(torch.int8), torch.stack(stored, 1))
    return rounded, torch.cat(values, 1)


@dataclass(frozen=True)
class _Group:
    levels_WO: Tensor
    values_WO: Tensor
    errors_WO: Tensor  # in units of the factor's diagonal
    stored_OS: Tensor


def _best(left_WO: Tensor, factor_WW: Tensor | None, grid: Grid) -> _Group:
    """For every row, the lattice whose errors cost least."""
    importance_W = None if factor_WW is None else factor_WW.diagonal() ** -2
    lattices = grid.lattices(left_WO.T, importance_W)
    best = _rounded(left_WO, next(lattices), factor_WW, grid.levels)
    cost_O = best.errors_WO.square().sum(0)
    for lattice in lattices:
        tried = _rounded(left_WO, lattice, factor_WW, grid.levels)
        found_O = tried.errors_WO.square().sum(0)
        better_O = found_O < cost_O
        cost_O = torch.where(better_O, found_O, cost_O)
        best = _Group(
            torch.where(better_O, tried.levels_WO, best.levels_WO),
            torch.where(better_O, tried.values_WO, best.values_WO),
            torch.where(better_O, tried.errors_WO, best.errors_WO),
            torch.where(better_O[:, None], tried.stored_OS, best.stored_OS),
        )
    return best


def _rounded(
    left_WO: Tensor, lattice: Lattice, factor_WW: Tensor | None, ends: tuple[int, int]
) -> _Group:
    shape = left_WO.T.shape
    step_WO = lattice.step_OW.expand(shape).T
    offset_WO = lattice.offset_OW.expand(shape).T
    inverse_WO = torch.where(step_WO == 0, 0.0, 1 / step_WO)
    if factor_WW is None:
        levels_WO = ((left_WO + offset_WO) * inverse_WO).round().clamp(*ends)
        values_WO = step_WO * levels_WO - offset_WO
        return _Group(levels_WO, values_WO, left_WO - values_WO, lattice.stored_OS)
    left_WO = left_WO.clone()
    levels_WO, values_WO = torch.empty_like(left_WO), torch.empty_like(left_WO)
    errors_WO = torch.empty_like(left_WO)
    diagonal = factor_WW.diagonal().tolist()
    for w, left_O in enumerate(left_WO):
        levels_WO[w] = ((left_O + offset_WO[w]) * inverse_WO[w]).round_().clamp_(*ends)
        values_WO[w] = step_WO[w] * levels_WO[w] - offset_WO[w]
        errors_WO[w] = (left_O - values_WO[w]) / diagonal[w]
        left_WO[w + 1 :].addr_(factor_WW[w, w + 1 :], errors_WO[w], alpha=-1)
    return _Group(levels_WO, values_WO, errors_WO, lattice.stored_OS)
