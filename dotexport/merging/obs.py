"""Optimal Brain Surgeon for groups of columns: which to remove, and what the others then say.

For a layer y = W x with H = E[x x^T] and G = H^-1, removing the columns S costs exactly

    loss   = tr(W_S (G_SS)^-1 W_S^T)       in units of E|y|^2, when all other columns are refitted
    update : W -= W_S (G_SS)^-1 G_S,:      which is least squares on what is kept
    G     -= G_:,S (G_SS)^-1 G_S,:

(Hassibi and Stork 1993; for groups Kurtic et al. 2022; for diffusion transformers OBS-Diff, arXiv
2510.06751.) Removals one after another therefore add up to the exact loss of removing them all.

Shapes: N groups, S columns of one group, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dotexport.merging.positive import inverse
from dotexport.merging.refit import Moments, Ridge

GATHERED = 1024  # columns of weights that are copied at once


@dataclass(frozen=True)
class Problem:
    """One layer that N groups of columns may leave.

    Attributes:
        weight_OI: the weights, best ones for the damped Hessian.
        hessian_II: damped.
        groups_NS: columns of each group; columns in no group stay.
        silent_I: columns that never fire, or always the same where a bias can say it; None:
            nothing is known of them.
    """

    weight_OI: Tensor
    hessian_II: Tensor
    groups_NS: Tensor
    silent_I: Tensor | None = None


@dataclass(frozen=True)
class Removal:
    """In which order groups leave, and what has been lost after each.

    Attributes:
        order: groups, the first to leave first.
        losses: exact loss after each removal, all layers together, the others refitted.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, num_groups: int, num_kept: int) -> Tensor:
        """Indices of the groups that stay, ascending."""
        gone = set(self.order[: num_groups - num_kept])
        return torch.tensor([n for n in range(num_groups) if n not in gone])


class _State:
    """Weights and inverse of one layer while groups leave it."""

    def __init__(self, weight_OI: Tensor, inverse_II: Tensor, groups_NS: Tensor) -> None:
        self.weight_OI, self.inverse_II, self.groups_NS = weight_OI, inverse_II, groups_NS

    @classmethod
    def of(cls, problem: Problem) -> _State:
        # Silent columns say nothing: without their weights they are the first to leave.
        silent_I = problem.silent_I if problem.silent_I is not None else torch.tensor(False)
        weight_OI = problem.weight_OI.masked_fill(silent_I.to(problem.weight_OI.device), 0.0)
        return cls(weight_OI, _inverse(problem.hessian_II), problem.groups_NS)

    def scores(self, alive: Tensor) -> Tensor:
        """tr(W_S (G_SS)^-1 W_S^T) of the groups that are alive."""
        groups_AS = self.groups_NS[alive]
        if groups_AS.shape[1] == 1:
            columns_A = groups_AS[:, 0]
            blocks = [self.weight_OI.T[some].square().sum(1) for some in columns_A.split(GATHERED)]
            return torch.cat(blocks) / self.inverse_II.diagonal()[columns_A]
        weight_ASO = self.weight_OI.T[groups_AS]
        inverse_ASS = self.inverse_II[groups_AS[:, :, None], groups_AS[:, None, :]]
        # One by one: with several threads MKL fails on a batch of matrices this large.
        solved_ASO = torch.stack(list(map(torch.linalg.solve, inverse_ASS, weight_ASO)))
        return (weight_ASO * solved_ASO).sum((1, 2))

    def remove(self, groups: Tensor) -> None:
        columns = self.groups_NS[groups].flatten()
        block_CC, rows_CI = self.inverse_II[columns][:, columns], self.inverse_II[columns]
        solved_CI = torch.linalg.solve(block_CC, rows_CI)
        self.weight_OI.addmm_(self.weight_OI[:, columns], solved_CI, alpha=-1)
        self.inverse_II.addmm_(self.inverse_II[:, columns], solved_CI, alpha=-1)

    def only(self, groups: Tensor) -> _State:
        """The same problem on these groups alone; scores and removals among them stay exact."""
        columns_GS = self.groups_NS[groups]
        columns = columns_GS.flatten()
        renamed_GS = torch.arange(len(columns), device=columns.device).view(columns_GS.shape)
        inverse_CC = self.inverse_II[columns][:, columns]
        return _State(self.weight_OI[:, columns], inverse_CC, renamed_GS)


def scores(problems: Sequence[Problem]) -> Tensor:
    """What each group alone would cost, all layers together."""
    alive = _all_groups(problems[0].groups_NS)
    return torch.stack([_State.of(problem).scores(alive) for problem in problems]).sum(0)


def greedy(problems: Sequence[Problem], count: int, *, block: int | None = None) -> Removal:
    """Remove `count` groups from all layers at once, the cheapest first, the rest refitted.

    A group leaves all layers together, so its cost is the sum over them. Where there are many
    groups, `block` of them leave per step, chosen one by one among the cheapest few, which makes
    the downdate of all the others one product of matrices.
    """
    return _removal([_State.of(problem) for problem in problems], count, block)


def greedy_inputs(
    moments: Moments, writer_OI: Tensor, groups_NS: Tensor, count: int, *, damping: float
) -> Removal:
    """The same for one writer: its best weights and its inverse come of one factor.

    Where the damping leaves the Hessian singular, it is as much as a fit would need.
    """
    solve = Ridge(moments, writer_OI)
    factor_II = solve.factor(damping)
    weight_OI = solve.weights(factor_II, last=True)
    return _removal([_State(weight_OI, inverse(factor_II), groups_NS)], count, None)


def _removal(states: Sequence[_State], count: int, block: int | None) -> Removal:
    block = block or max(1, len(states[0].groups_NS) // 128)
    order_C, cost_C = _greedy(states, count, block)
    return Removal(tuple(order_C.tolist()), tuple(accumulate(cost_C.tolist())))


def _greedy(states: Sequence[_State], count: int, block: int) -> tuple[Tensor, Tensor]:
    """Groups in the order in which they leave, and the cost of each; the host waits for none."""
    alive = _all_groups(states[0].groups_NS)
    order, costs = [alive[:0]], [states[0].inverse_II.diagonal()[:0]]
    for done in range(0, count, block):
        score_A = torch.stack([state.scores(alive) for state in states]).sum(0).clamp_min(0)
        step = min(block, count - done)
        if step == 1:
            leaving, cost = alive[score_A.argmin()[None]], score_A.min()[None]
        else:
            pool = alive[torch.argsort(score_A, stable=True)[: 4 * step]]
            chosen, cost = _greedy([state.only(pool) for state in states], step, 1)
            leaving = pool[chosen]
        for state in states:
            state.remove(leaving)
        order.append(leaving)
        costs.append(cost)
        # Those that left go to the end and are cut off: of a mask, nobody knows how long it is.
        gone_A = torch.isin(alive, leaving).to(torch.uint8)
        alive = alive[torch.argsort(gone_A, stable=True)[: len(alive) - step]]
    return torch.cat(order), torch.cat(costs)


def _all_groups(groups_NS: Tensor) -> Tensor:
    return torch.arange(len(groups_NS), device=groups_NS.device)


def refit(weight_OI: Tensor, hessian_II: Tensor, kept: Tensor) -> Tensor:
    """Least squares on the kept columns: W_K = (W H)_:,K (H_KK)^-1."""
    right_OK = (weight_OI.double() @ hessian_II)[:, kept]
    return solve(hessian_II[kept][:, kept], right_OK)


def solve(matrix_II: Tensor, right_OI: Tensor) -> Tensor:
    """R M^-1 for a positive definite M."""
    return torch.cholesky_solve(right_OI.T, torch.linalg.cholesky(matrix_II)).T


def damped(hessian_II: Tensor, damping: float) -> Tensor:
    """H + damping x mean(diag H) x I; a tiny bound keeps the inverse finite where nothing fires."""
    share = (damping * hessian_II.diagonal().mean()).clamp_min(1e-30)
    return hessian_II + share * torch.eye(
        len(hessian_II), dtype=hessian_II.dtype, device=hessian_II.device
    )


def _inverse(matrix_II: Tensor) -> Tensor:
    """Of a positive definite matrix, or of one that is so but for rounding."""
    factor_II, failed = torch.linalg.cholesky_ex(matrix_II)
    return torch.linalg.inv(matrix_II) if failed else torch.cholesky_inverse(factor_II)


def loss(weight_OI: Tensor, other_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - W') H (W - W')^T): how far two layers are apart on the data."""
    gap_OI = weight_OI.double() - other_OI.double()
    return float(((gap_OI @ hessian_II) * gap_OI).sum())
