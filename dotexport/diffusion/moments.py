"""Second moments of what a linear layer reads: all that pruning needs to know about the data.

Shapes: I inputs of a layer, O outputs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dotexport.merging.obs import Problem, damped, solve


@dataclass
class Moments:
    """Weighted sums over tokens, in float64.

    Attributes:
        inputs_II: sum of a x x^T.
        total_I: sum of a x.
        weight: sum of a.
        cross_OI, answers_O: sums of a y x^T and a y, where y is what the layer should say; None
            where that is what it says.
    """

    inputs_II: Tensor
    total_I: Tensor
    weight: float = 0.0
    cross_OI: Tensor | None = None
    answers_O: Tensor | None = None

    @classmethod
    def zeros(cls, num_in: int, num_out: int = 0) -> Moments:
        """Empty sums; `num_out` where answers are summed as well."""
        inputs_II = torch.zeros(num_in, num_in, dtype=torch.float64)
        total_I = torch.zeros(num_in, dtype=torch.float64)
        if not num_out:
            return cls(inputs_II, total_I)
        cross_OI = torch.zeros(num_out, num_in, dtype=torch.float64)
        return cls(inputs_II, total_I, 0.0, cross_OI, torch.zeros(num_out, dtype=torch.float64))

    def add(self, x_TI: Tensor, y_TO: Tensor | None = None, *, weight: float = 1.0) -> None:
        """Take up a batch of tokens that all count `weight`."""
        x_TI = x_TI.detach().double()
        self.inputs_II += weight * (x_TI.T @ x_TI)
        self.total_I += weight * x_TI.sum(0)
        self.weight += weight * len(x_TI)
        if self.cross_OI is not None and self.answers_O is not None:
            assert y_TO is not None  # whoever sums answers gives them
            y_TO = y_TO.detach().double()
            self.cross_OI += weight * (y_TO.T @ x_TI)
            self.answers_O += weight * y_TO.sum(0)

    def __add__(self, other: Moments) -> Moments:
        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        return Moments(
            self.inputs_II + other.inputs_II,
            self.total_I + other.total_I,
            self.weight + other.weight,
            both(self.cross_OI, other.cross_OI),
            both(self.answers_O, other.answers_O),
        )

    def of(self, kept: Tensor) -> Moments:
        """The same sums for a subset of the inputs."""
        cross_OK = None if self.cross_OI is None else self.cross_OI[:, kept]
        inputs_KK = self.inputs_II[kept][:, kept]
        return Moments(inputs_KK, self.total_I[kept], self.weight, cross_OK, self.answers_O)

    @property
    def mean(self) -> Tensor:
        return self.total_I / max(self.weight, 1e-300)

    def hessian(self, *, centred: bool) -> Tensor:
        """E[x x^T]; centred, the covariance.

        A bias is one more column of the weights, and its feature is 1 for every token. Solving for
        it first leaves the covariance for the other columns (a Schur complement), and the bias is
        then b + (W - W') E[x]: exact, and the damping never touches it.
        """
        mean_II = self.inputs_II / max(self.weight, 1e-300)
        return mean_II - torch.outer(self.mean, self.mean) if centred else mean_II

    def cross(self, *, centred: bool) -> Tensor:
        """E[y x^T]; centred, the covariance of answers and inputs."""
        assert self.cross_OI is not None
        assert self.answers_O is not None
        mean_OI = self.cross_OI / max(self.weight, 1e-300)
        if not centred:
            return mean_OI
        return mean_OI - torch.outer(self.answers_O / max(self.weight, 1e-300), self.mean)

    def best_weights(self, weight_OI: Tensor, *, damping: float, centred: bool) -> Tensor:
        """The weights that say best what the layer should say, drawn to the old ones.

        argmin E|y - W x|^2 + damping |W - W_old|^2. Without answers of its own, it says what
        it should already.
        """
        weight_OI = weight_OI.double()
        if self.cross_OI is None:
            return weight_OI
        hessian_II = self.hessian(centred=centred)
        ridge_II = damped(hessian_II, damping) - hessian_II
        right_OI = self.cross(centred=centred) + weight_OI @ ridge_II
        return solve(hessian_II + ridge_II, right_OI)

    def problem(
        self, weight_OI: Tensor, groups_NS: Tensor, *, damping: float, centred: bool
    ) -> Problem:
        """What a layer loses when groups leave it; `centred` where it has a bias."""
        hessian_II = self.hessian(centred=centred)
        scale_I = (self.inputs_II.diagonal() / max(self.weight, 1e-300)).clamp_min(1e-300)
        return Problem(
            self.best_weights(weight_OI, damping=damping, centred=centred),
            damped(hessian_II, damping),
            groups_NS,
            hessian_II.diagonal() <= 1e-12 * scale_I,
        )
