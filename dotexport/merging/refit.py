"""Closed-form refit: least squares toward what the teacher computes, with a ridge toward the
analytic weights.

Products over the tokens of a batch are in the dtype it comes in, what batches add up to is float64,
and so is every solve: a ridge stands far above what float32 loses over a few thousand tokens. Sums
of two sets of tokens add, so data-parallel runs and held-out splits need nothing else.

Shapes: I features that go in, O features that come out, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dotexport.merging.gram import Gram
from dotexport.merging.positive import factored, solved
from dotexport.processes.processes import Processes

Solve = Callable[[float], Tensor]
"""From the strength of a ridge to weights."""
Solver = Callable[["Moments", Tensor], Solve]
"""From moments and the weights that a ridge pulls to."""

# In units of the mean diagonal of the inputs' Gram matrix.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ROWS = 512  # of a prior in float64 at once


@dataclass
class Moments:
    """Second moments of inputs z and targets t, summed over tokens.

    Attributes:
        inputs: sum of z z^T.
        cross_OI: sum of t z^T.
        metric_OO: how errors in t are weighed, e^T metric e; None is the identity.
        targets: sum of t^T metric t.
        count: number of tokens, by what they count for.
    """

    inputs: Gram
    cross_OI: Tensor
    metric_OO: Tensor | None = None
    targets: float = 0.0
    count: float = 0

    @classmethod
    def zeros(
        cls,
        num_in: int,
        num_out: int,
        *,
        metric_OO: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Moments:
        cross_OI = torch.zeros(num_out, num_in, dtype=torch.float64, device=device)
        return cls(Gram.zeros(num_in, device), cross_OI, metric_OO)

    def add(self, inputs_TI: Tensor, targets_TO: Tensor) -> None:
        """Take up a batch of tokens."""
        self.inputs.add(inputs_TI)
        self.cross_OI += targets_TO.T @ inputs_TI
        metric_OO = None if self.metric_OO is None else self.metric_OO.to(targets_TO.dtype)
        felt_TO = targets_TO if metric_OO is None else targets_TO @ metric_OO
        self.targets = self.targets + torch.linalg.vecdot(felt_TO, targets_TO).sum(
            dtype=torch.float64
        )
        self.count += len(inputs_TI)

    def sum_over(self, processes: Processes) -> None:
        """Take up what the others have."""
        parts = [torch.as_tensor(part, dtype=torch.float64) for part in (self.targets, self.count)]
        numbers_P = torch.stack([part.to(self.cross_OI.device) for part in parts])
        processes.sum(*self.inputs.stored, self.cross_OI, numbers_P)
        self.targets, self.count = float(numbers_P[0]), int(numbers_P[1])

    def __add__(self, other: Moments) -> Moments:
        return replace(
            self,
            inputs=self.inputs + other.inputs,
            cross_OI=self.cross_OI + other.cross_OI,
            targets=self.targets + other.targets,
            count=self.count + other.count,
        )

    def take(self, other: Moments, share: float) -> None:
        """Take up another's sums, as if every token counted for so many."""
        self.inputs.take(other.inputs, share)
        self.cross_OI.add_(other.cross_OI, alpha=share)
        self.targets += other.targets * share
        self.count += other.count * share

    def of(self, kept: Tensor) -> Moments:
        """The same sums for a subset of the inputs."""
        return replace(self, inputs=self.inputs.among(kept), cross_OI=self.cross_OI[:, kept])

    def given_last(self) -> Moments:
        """The sums after the last input has explained what it can of the others and the targets.

        With a last input of ones these are covariances: neurons are then chosen as if every writer
        had a bias, which it has.
        """
        row_I, answer_O = self.inputs.last, self.cross_OI[:, -1]
        energy = row_I[-1].clamp_min(1e-30)
        return replace(
            self,
            inputs=self.inputs.given_last(),
            cross_OI=self.cross_OI[:, :-1] - torch.outer(answer_O, row_I[:-1]) / energy,
            targets=self.targets - float((self.weigh(answer_O[:, None])[:, 0] @ answer_O) / energy),
        )

    def loss(self, weights_OI: Tensor) -> float:
        """Mean over tokens of |t - W z|^2 in the metric, from the sums alone."""
        weights_OI = weights_OI.double()
        weighed_OI = self.weigh(weights_OI)
        explained = 2 * (weighed_OI * self.cross_OI).sum()
        spent = self.inputs.form(weighed_OI, weights_OI)
        return max(float(self.targets - explained + spent) / max(self.count, 1), 0.0)

    @property
    def energy(self) -> float:
        """Mean over tokens of |t|^2 in the metric: the loss of answering zero."""
        return float(self.targets) / max(self.count, 1)

    def weigh(self, errors_OX: Tensor) -> Tensor:
        """The metric times these errors."""
        return errors_OX if self.metric_OO is None else self.metric_OO @ errors_OX


@dataclass(frozen=True)
class Fit:
    """Refitted weights.

    Attributes:
        ridge: the strength that was chosen; infinity keeps the analytic weights.
        error: held-out loss relative to the target's energy; 0 is exact, 1 is as good as nothing.
        analytic_error: the same for the analytic weights.
    """

    weights_OI: Tensor
    ridge: float
    error: float
    analytic_error: float

    @classmethod
    def unchanged(cls, prior_OI: Tensor, held_out: Moments) -> Fit:
        """The analytic weights as they are."""
        error = held_out.loss(prior_OI) / (held_out.energy or 1.0)
        return cls(prior_OI, math.inf, error, error)

    def as_dict(self) -> dict[str, float | None]:
        """What a report says; JSON has no infinity, so kept analytic weights show as null."""
        ridge = None if math.isinf(self.ridge) else self.ridge
        return {"error": self.error, "analytic_error": self.analytic_error, "ridge": ridge}


@dataclass
class Ridge:
    """argmin_W  E|t - W z|^2 + lam |W - prior|^2, with lam = ridge x mean diagonal of E z z^T.

    The ridge pulls toward the analytic weights, never toward zero.
    """

    moments: Moments
    prior_OI: Tensor
    residual_IO: Tensor = field(init=False)

    def __post_init__(self) -> None:
        inputs_II = self.moments.inputs.full()
        said_OI = inputs_II.new_empty(self.prior_OI.shape)
        for own, prior in zip(said_OI.split(ROWS), self.prior_OI.split(ROWS), strict=True):
            torch.matmul(prior.double(), inputs_II, out=own)
        self.residual_IO = said_OI.neg_().add_(self.moments.cross_OI).T

    def factor(self, ridge: float) -> Tensor:
        """Cholesky factor of E z z^T + lam; where that is singular, with the next stronger ridge
        that lifts it."""
        while True:
            damped_II = self.moments.inputs.full()
            mean = float(self.moments.inputs.diagonal().mean())
            damped_II.diagonal().add_(max(ridge * max(mean, 1e-30), 1e-30))
            factor_II, failed = factored(damped_II)
            if not failed:
                return factor_II
            del damped_II, factor_II
            ridge = max(10 * ridge, 1e-12)

    def weights(self, factor_II: Tensor, *, last: bool = False) -> Tensor:
        """Args: last: nothing is asked again, and the residual gives its place."""
        right_IO = self.residual_IO if last else self.residual_IO.clone()
        return solved(factor_II, right_IO).T.add_(self.prior_OI)


def ridge_solver(moments: Moments, prior_OI: Tensor) -> Solve:
    """`Ridge` as a function of its strength."""
    problem = Ridge(moments, prior_OI)
    return lambda ridge: problem.weights(problem.factor(ridge))


def ridge_solve(moments: Moments, prior_OI: Tensor, ridge: float) -> Tensor:
    """`ridge_solver` with a single ridge."""
    return ridge_solver(moments, prior_OI)(ridge)


def gain_solver(moments: Moments, prior_OI: Tensor, *, map_OI: Tensor) -> Solve:
    """The same for W = map diag(g): argmin_g  E|t - map (g o z)|^2 in the metric, plus the ridge.

    The normal equations are (map^T G map o E z z^T) g = diag(map^T G E t z^T), o the entrywise
    product and G the metric.
    """
    weighed_OI = moments.weigh(map_OI)
    prior_I = (map_OI * prior_OI).sum(0) / map_OI.square().sum(0)
    normal_II = (map_OI.T @ weighed_OI) * moments.inputs.full()
    mean = float(normal_II.diagonal().mean())
    residual_I = (weighed_OI * moments.cross_OI).sum(0) - normal_II @ prior_I

    def solve(ridge: float) -> Tensor:
        damped_II = normal_II.clone()
        damped_II.diagonal().add_(max(ridge * mean, 1e-30))
        solved_OI: Tensor = map_OI * (prior_I + torch.linalg.solve(damped_II, residual_I))
        return solved_OI

    return solve


def symmetric_solve(left_KK: Tensor, right_KK: Tensor, wanted_KK: Tensor) -> Tensor:
    """The symmetric S of  A S B + B S A = M + M^T, for positive definite A and B.

    It is the least-squares answer to "S should act like M does", weighed by A on what comes out and
    by B on what goes in. In a basis V with V^T B V = 1 and V^T A V = diag(l) the equation parts:
    S = V X V^T with X_ij = (V^T (M + M^T) V)_ij / (l_i + l_j).
    """
    root_KK = torch.linalg.cholesky(right_KK)
    half_KK = torch.linalg.solve_triangular(root_KK, left_KK, upper=False)
    inner_KK = torch.linalg.solve_triangular(root_KK, half_KK.T, upper=False)
    values_K, vectors_KK = torch.linalg.eigh((inner_KK + inner_KK.T) / 2)
    v_KK = torch.linalg.solve_triangular(root_KK.T, vectors_KK, upper=True)
    sums_KK = (values_K[:, None] + values_K[None]).clamp_min(1e-30)
    solved: Tensor = v_KK @ ((v_KK.T @ (wanted_KK + wanted_KK.T) @ v_KK) / sums_KK) @ v_KK.T
    return solved


def fit(
    train: Moments,
    held_out: Moments,
    prior_OI: Tensor,
    *,
    ridge: float | None = None,
    solver: Solver = ridge_solver,
) -> Fit:
    """Choose the ridge on held-out tokens. They take no part in the solve, so that what is measured
    on them later holds for other text of their kind.

    The prior itself is a candidate: a refit that does not help held-out tokens is not made.

    Args:
        ridge: the only strength to be considered, without looking back; None: the best of RIDGES.
    """
    prior_OI = prior_OI.double()
    unchanged, solve = Fit.unchanged(prior_OI, held_out), solver(train, prior_OI)
    energy = held_out.energy or 1.0

    def tried(strength: float) -> Fit:
        weights_OI = solve(strength)
        return Fit(weights_OI, strength, held_out.loss(weights_OI) / energy, unchanged.error)

    if ridge is not None:
        return tried(ridge)
    best = _best(tried)
    return best if best.error < unchanged.error else unchanged


def _best(tried: Callable[[float], Fit]) -> Fit:
    """Of RIDGES, by its error.

    Too weak and too strong both lose, so the search walks downhill from the strength in the middle,
    to weaker ones first.
    """
    middle = len(RIDGES) // 2
    first = best = tried(RIDGES[middle])
    for way in (RIDGES[:middle][::-1], RIDGES[middle + 1 :]):
        for ridge in way:
            found = tried(ridge)
            if not found.error < best.error:
                break
            best = found
        if best is not first:
            break
    return best


def compensate(
    moments: Moments, weights_OI: Tensor, kept: Tensor, *, damping: float = 1e-10
) -> Tensor:
    """W C[:,S] C_SS^-1: what the kept inputs say best in the place of all of them.

    C is the Gram matrix of all inputs; no target is involved, only the weights themselves. Where
    C_SS is singular, a trace of a ridge toward W_S decides.
    """
    all_to_kept = replace(moments, cross_OI=weights_OI.double() @ moments.inputs.full()).of(kept)
    return ridge_solve(all_to_kept, weights_OI[:, kept], damping)
