"""Plans: how the mass of N neurons moves onto K of them. POT solves what has no closed form.

Shapes: N neurons before, K neurons after.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dotexport.merging.ot.cost import Array, Cost
from dotexport.merging.transport_options import TransportOptions

logger = logging.getLogger(__name__)

LOOSE = 1e-3  # a marginal error worth a word


@dataclass(frozen=True)
class Coupling:
    """A plan between neurons, the signs with which they stand for each other, and its price."""

    plan_NK: Array
    sign_NK: Array
    mass_N: Array
    mass_K: Array | None
    cost: float

    @property
    def marginal_error(self) -> float:
        """L1 distance of the marginals from what was asked for; 0 is exact."""
        error = np.abs(self.plan_NK.sum(1) - self.mass_N).sum()
        if self.mass_K is not None:
            error += np.abs(self.plan_NK.sum(0) - self.mass_K).sum()
        return float(error)

    @property
    def sources_per_target(self) -> float:
        """Effective number of sources per target: exp of the mean entropy of the plan's columns."""
        return Summary.of([self]).sources_per_target

    def as_dict(self) -> dict[str, float]:
        """What a report says about this site."""
        return Summary.of([self]).as_dict()

    def merge_map(self) -> Array:
        """M_NK: column j holds the signed weights with which the sources make up target j."""
        total_K = np.maximum(self.plan_NK.sum(0, keepdims=True), 1e-300)
        merge_NK: Array = self.sign_NK * self.plan_NK / total_K
        return merge_NK


@dataclass(frozen=True)
class Summary:
    """What a report says of a plan, all of whose rows have been seen once.

    Attributes:
        sources_per_target: exp of the mean entropy of the columns. That of p / c, where c is the
            sum of a column, is log c - (sum of p log p) / c.
    """

    cost: float
    sources_per_target: float
    marginal_error: float

    @classmethod
    def of(cls, blocks: Iterable[Coupling]) -> Summary:
        """Of a plan in blocks of rows."""
        cost = error = total_K = logs_K = 0.0
        for block in blocks:
            plan_NK = block.plan_NK
            cost, error = cost + block.cost, error + block.marginal_error
            total_K = total_K + plan_NK.sum(0)
            logs_K = logs_K + (plan_NK * np.log(np.maximum(plan_NK, 1e-300))).sum(0)
        total_K = np.maximum(total_K, 1e-300)
        entropy_K = np.log(total_K) - logs_K / total_K
        return cls(cost, float(np.exp(entropy_K.mean())), error)

    def as_dict(self) -> dict[str, float]:
        return {
            "transport_cost": self.cost,
            "sources_per_target": self.sources_per_target,
            "marginal_error": self.marginal_error,
        }


def couple(cost: Cost, mass_N: Array, options: TransportOptions) -> Coupling:
    """Find the plan `argmin <T, C> - epsilon H(T)` under the marginals of `options.plan`.

    Args:
        cost: distances and signs; targets are among the sources, so each column has a zero.
        mass_N: importance of each source; scaled to sum 1. The balanced plan ignores it (uniform).
    """
    if options.plan == "balanced":
        return _balanced(cost, options)
    return semi_relaxed(cost, shares(mass_N), epsilon=options.epsilon)


def shares(mass_N: Array) -> Array:
    """Mass scaled to sum 1; where there is none, all have as much."""
    total = mass_N.sum()
    return mass_N / total if total > 0 else np.full_like(mass_N, 1 / len(mass_N))


def semi_relaxed(cost: Cost, mass_N: Array, *, epsilon: float) -> Coupling:
    """The plan of some sources, whatever others do: only their own mass is fixed."""
    plan_NK = mass_N[:, None] * nearest_targets(cost.cost_NK, epsilon=epsilon)
    return _coupling(plan_NK, cost, mass_N, None)


def nearest_targets(cost_NK: Array, *, epsilon: float) -> Array:
    """Rows of the semi-relaxed plan: softmax_j(-C_ij / epsilon), or the argmin for epsilon = 0.

    Without a constraint on the targets the rows of the entropic problem part ways, and each has
    this closed form.
    """
    if epsilon == 0:
        nearest_NK: Array = np.eye(cost_NK.shape[1])[cost_NK.argmin(1)]
        return nearest_NK
    log_NK = -(cost_NK - cost_NK.min(1, keepdims=True)) / epsilon
    row_NK: Array = np.exp(log_NK)
    row_NK /= row_NK.sum(1, keepdims=True)
    return row_NK


def _balanced(cost: Cost, options: TransportOptions) -> Coupling:
    import ot  # takes two seconds, and scikit-learn with it

    n, k = cost.cost_NK.shape
    mass_N, mass_K = np.full(n, 1 / n), np.full(k, 1 / k)
    if options.epsilon == 0:
        plan_NK = ot.emd(mass_N, mass_K, cost.cost_NK, numItermax=10_000_000)
    else:
        with warnings.catch_warnings():
            # Non-convergence shows as marginal_error, which every report carries.
            warnings.simplefilter("ignore", UserWarning)
            # In logs: in float32, exp(-cost / epsilon) would be exactly 0 beyond 104.
            plan_NK = ot.sinkhorn(
                mass_N,
                mass_K,
                cost.cost_NK,
                options.epsilon,
                method="sinkhorn_log",
                numItermax=options.max_steps,
            )
    return _coupling(plan_NK, cost, mass_N, mass_K)


def _coupling(plan_NK: Array, cost: Cost, mass_N: Array, mass_K: Array | None) -> Coupling:
    price = float((plan_NK * cost.cost_NK).sum())
    coupling = Coupling(plan_NK, cost.sign_NK, mass_N, mass_K, price)
    if coupling.marginal_error > LOOSE:
        logger.warning(
            "the transport plan misses its marginals by %.1e; a larger --epsilon converges faster",
            coupling.marginal_error,
        )
    return coupling
