"""Norms that lie behind a matrix: of what a sublayer gives, and of all its queries or keys.

A sublayer that normalises its output adds  gamma o (W z) / size(W z)  to the stream, o entrywise
and size(u) = sqrt(mean u^2 + eps). It is no linear function of W, but for given sizes it is one of
V = diag(gamma) W, with z / size as input. So V is fitted as any writer is, sizes follow from it,
and again (iteratively reweighted least squares); gamma then has a closed form of its own.

Shapes: T tokens, D outputs before, K after, I inputs of the writer (with a last one of ones where
it has a bias), Q queries or keys, S those that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_GAMMA = 0.05  # of the root mean square of a norm's; the writer's rows below it stay
TINY = 1e-30


def size(written_TK: Tensor, epsilon: float) -> Tensor:
    """What an RMSNorm divides by, (..., 1)."""
    size_T1: Tensor = (written_TK.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return size_T1


def merged(weights_DI: Tensor, gamma_D: Tensor, E_DK: Tensor) -> tuple[Tensor, Tensor]:
    """Writer (K, I) and gamma (K,) of a stream whose axes are merged by E, with one entry per row.

    Each new output stands for the old ones of its axis, as large as they are together, so that the
    norm divides by the same: p^T W with p_i the length of row i, signed so that copies add up. Its
    gamma is then the least-squares answer to  gamma p^T W = (E^T Gamma W)  row by row. Where
    rows are multiples of one another both are exact; where E keeps axes, both are the old ones.
    """
    weights_DI, gamma_D = weights_DI.double(), gamma_D.double()
    length_D1 = weights_DI.norm(dim=1, keepdim=True).clamp_min(TINY)
    sign_DK = E_DK.sign() * torch.where(gamma_D < 0, -1.0, 1.0)[:, None]
    # Of one axis alone the sign says nothing: gamma keeps its own.
    alone_K = (E_DK != 0).sum(0) == 1
    sign_DK = torch.where(alone_K, E_DK.abs().sign(), sign_DK)
    p_DK = sign_DK * length_D1
    p_DK = p_DK / p_DK.norm(dim=0, keepdim=True)
    new_KI, wanted_KI = p_DK.T @ weights_DI, E_DK.T @ (gamma_D[:, None] * weights_DI)
    energy_K = new_KI.square().sum(1)
    silent_K = (E_DK * p_DK * gamma_D[:, None]).sum(0)
    fitted_K = (wanted_KI * new_KI).sum(1) / energy_K.clamp_min(TINY)
    return new_KI, torch.where(energy_K > TINY, fitted_K, silent_K)


@dataclass(frozen=True)
class Behind:
    """The norm behind a writer, as the fit sees it.

    Attributes:
        gamma_K: what it multiplies with.
        epsilon: of the class.
    """

    gamma_K: Tensor
    epsilon: float

    def folded(self, weights_KI: Tensor) -> Tensor:
        """V = diag(gamma) W."""
        return self._divisor()[:, None] * weights_KI

    def unfolded(self, folded_KI: Tensor) -> Tensor:
        """W of V."""
        return folded_KI / self._divisor()[:, None]

    def spread(self, inside_TI: Tensor, folded_KI: Tensor) -> Tensor:
        """z / size(W z)."""
        weights_KI = self.unfolded(folded_KI).to(inside_TI)
        return inside_TI / size(inside_TI @ weights_KI.T, self.epsilon)

    def where_it_matters(self, fitted_KI: Tensor, prior_KI: Tensor) -> Tensor:
        """The fit, but for outputs with hardly any gamma: what they give decides what the others
        are divided by, and a fit of what is left of them would blow it up."""
        rms = self.gamma_K.square().mean().sqrt()
        return torch.where((self.gamma_K.abs() >= LEAST_GAMMA * rms)[:, None], fitted_KI, prior_KI)

    def _divisor(self) -> Tensor:
        gamma_K = self.gamma_K.double()
        least = (1e-9 * gamma_K.abs().max()).clamp_min(TINY)
        return torch.where(gamma_K.abs() < least, least, gamma_K)


@dataclass
class FewerFeatures:
    """Gamma of a norm over all queries (or keys) once some have left, feature by feature.

    What is kept should be what it was: `argmin_g E (g q_s / size(q_S) - gamma q_s / size(q))^2`,
    which is  g = gamma E[q_s^2 / (size(q) size(q_S))] / E[q_s^2 / size(q_S)^2].
    """

    gamma_Q: Tensor
    kept: Tensor
    epsilon: float

    def __post_init__(self) -> None:
        like_S = self.gamma_Q[self.kept]
        self.both_S = torch.zeros_like(like_S, dtype=torch.float64)
        self.own_S = torch.zeros_like(self.both_S)

    def add(self, given_TQ: Tensor) -> None:
        """Take up what the reader gave for some tokens, before the norm."""
        given_TQ = given_TQ.double()
        stay_TS = given_TQ[:, self.kept]
        after_TS = stay_TS / size(stay_TS, self.epsilon)
        before_TS = stay_TS / size(given_TQ, self.epsilon)
        self.both_S += (after_TS * before_TS).sum(0)
        self.own_S += after_TS.square().sum(0)

    def fitted(self) -> Tensor:
        """Gamma (S,)."""
        gamma_S: Tensor = self.gamma_Q[self.kept] * (self.both_S / self.own_S.clamp_min(TINY))
        return gamma_S
