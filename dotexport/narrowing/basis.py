"""Basis of the residual stream: which K directions of its D a narrower model keeps.

All methods answer with the same thing, so they are interchangeable and each is measured.

A model that normalises what is added to its stream is the same only in its own axes: of these some
are kept, or merged (AXIS_METHODS).

Shapes: D width before, K width after, S norm sites, G axes that are merged into one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dotexport.errors import UsageError
from dotexport.merging import obs
from dotexport.merging.ot.cost import Array, Indices, activation_distance, cosine
from dotexport.merging.ot.coupling import Coupling, couple
from dotexport.merging.transport_options import TransportOptions
from dotexport.narrowing.narrow_options import AUTO
from dotexport.narrowing.norm_statistics import Sight

LEAST_ALIKE = 0.5  # |cosine| of two axes that may become one
OBS_DAMPING = 1e-9
LEARNING_STEPS = 60
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns E_DK: the narrow stream is E^T x.

    Attributes:
        kept_energy: share of the second moment that lies in the span; 1 keeps all.
        transport: what is said of the plan it came from, if it came from one.
        tried: where several were measured, held-out KL divergence in nats per method.
    """

    matrix_DK: Array
    method: str
    kept_energy: float
    transport: Mapping[str, float] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What a report says."""
        report = {"method": self.method, "kept_energy": self.kept_energy}
        tried = {"tried": self.tried} if self.tried else {}
        return report | tried | dict(self.transport)


def whole(width: int) -> Basis:
    """The identity: an untouched residual stream."""
    return Basis(np.eye(width), "identity", 1.0)


def find_basis(
    method: str,
    sight: Sight,
    width: int,
    transport: TransportOptions | None = None,
    *,
    rotates: bool = True,
) -> Basis:
    """A basis of `width` columns by one of METHODS, or of AXIS_METHODS where axes cannot be mixed.

    Axes of massive activations are kept as they are, and the method decides on the rest: a few
    positions with values thousands of times the median (Sun et al., arXiv 2402.17762) carry
    attention sinks, and are outliers to every second moment.

    Raises:
        UsageError: unknown method.
    """
    methods = methods_for(rotates)
    if method not in methods:
        raise UsageError(f"basis must be one of {', '.join(sorted(methods))}, not {method!r}")
    moment_DD = sight.mean()
    forced = np.array(sorted(sight.massive)[:width], dtype=np.intp)
    free = np.setdiff1d(np.arange(len(moment_DD)), forced)
    rest = sight.within(free.tolist()) if len(forced) else sight
    inner, coupling = methods[method](rest, width - len(forced), transport or TransportOptions())
    matrix_DK = np.zeros((len(moment_DD), width))
    matrix_DK[forced, np.arange(len(forced))] = 1.0
    matrix_DK[free[:, None], np.arange(len(forced), width)] = inner
    kept = np.trace(matrix_DK.T @ moment_DD @ matrix_DK) / np.trace(moment_DD)
    return Basis(matrix_DK, method, float(kept), coupling.as_dict() if coupling else {})


def _select(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Keep the axes with the largest second moment."""
    moment_DD = sight.mean()
    return np.eye(len(moment_DD))[:, _largest(moment_DD, width)], None


def _pca(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Keep the leading eigenvectors: the least squared error a projection can have."""
    vectors_DD = np.linalg.eigh(sight.mean()).eigenvectors
    return _fixed_signs(vectors_DD[:, ::-1][:, :width]), None


def _dot(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, Coupling]:
    """Merge axes by transport onto the strongest ones, then orthonormalise: M = Q R.

    The factorisation that carries a merge past RMSNorm is that of DOTResize (arXiv 2507.04517).
    With the pseudo-inverse as decoder R cancels, M M^+ = Q Q^T, so Q is all that is needed.
    """
    moment_DD = sight.mean()
    kept_K = _largest(moment_DD, width)
    cost = activation_distance(moment_DD, kept_K)
    coupling = couple(cost, np.sqrt(np.maximum(np.diag(moment_DD), 0.0)), options)
    q_DK, _ = np.linalg.qr(coupling.merge_map())
    return _fixed_signs(q_DK), coupling


def _learned(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Descend from the best of the others what readers lose, over the Stiefel manifold.

    Steps are Adam's on a free matrix; QR leads back to orthonormal columns, and its derivative
    makes the gradient tangent. The best point on the way is kept, so it is never worse than where
    it starts.
    """
    starts = [METHODS[name](sight, width, options)[0] for name in ("pca", "dot", "select")]
    matrices = [torch.from_numpy(start).to(sight.moments[0]) for start in starts]
    free_DK = min(matrices, key=lambda m: float(reader_loss(sight, m))).clone().requires_grad_()
    best_DK, least = free_DK.detach().clone(), float("inf")
    optimiser = torch.optim.Adam([free_DK], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, LEARNING_STEPS)
    for _ in range(LEARNING_STEPS):
        with torch.enable_grad():
            basis_DK = torch.linalg.qr(free_DK).Q
            loss = reader_loss(sight, basis_DK)
            optimiser.zero_grad()
            loss.backward()
        if float(loss.detach()) < least:
            best_DK, least = basis_DK.detach().clone(), float(loss.detach())
        optimiser.step()
        schedule.step()
    return _fixed_signs(best_DK.cpu().numpy()), None


def reader_loss(sight: Sight, basis_DK: Tensor) -> Tensor:
    """What readers lose when they see E^T x and are refitted, as a share of what they see.

    Mean over sites of tr(G (C - C E (E^T C E)^-1 E^T C)) / tr(G C): each site counts alike, for the
    same reason as in the mean moment. A head that is the embedding's table sees E E^T x and
    cannot be refitted: there it is tr(G (1 - E E^T) C (1 - E E^T)).
    """
    shares = []
    refitted = len(sight.moments) - sight.tied
    for c_DD, g_DD in zip(sight.moments[refitted:], sight.metrics[refitted:], strict=True):
        lost_DD = _eye(c_DD) - basis_DK @ basis_DK.T
        shares.append(((lost_DD @ c_DD @ lost_DD) * g_DD).sum() / (g_DD * c_DD).sum())
    for c_DD, g_DD in zip(sight.moments[:refitted], sight.metrics[:refitted], strict=True):
        seen_DK = c_DD @ basis_DK
        inner_KK = basis_DK.T @ seen_DK
        damped_KK = inner_KK + 1e-9 * inner_KK.diagonal().mean() * _eye(inner_KK)
        explained_KD = torch.linalg.solve(damped_KK, seen_DK.T)
        energy = (g_DD * c_DD).sum().clamp_min(1e-30)
        shares.append(1 - (explained_KD * (g_DD @ seen_DK).T).sum() / energy)
    return torch.stack(shares).mean()


Method = Callable[[Sight, int, TransportOptions], tuple[Array, Coupling | None]]
METHODS: dict[str, Method] = {
    "dot": _dot,
    "learned": _learned,
    "pca": _pca,
    "select": _select,
}


def _obs(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Keep the axes without which readers lose least, by greedy Optimal Brain Surgeon."""
    return np.eye(len(sight.moments[0]))[:, _needed(sight, width)], None


def _needed(sight: Sight, width: int) -> Indices:
    """Axes that stay when those leave, one by one, that cost all readers least.

    The loss of a site is that of `reader_loss`, tr(G (C - C_:S C_SS^-1 C_S:)) / tr(G C) for axes S:
    that of an OBS problem with weights G^(1/2) and Hessian C. A head that is the embedding's table
    is not refitted: there an axis costs G_ii C_ii.
    """
    problems = []
    size, refitted = len(sight.moments[0]), len(sight.moments) - sight.tied
    counts = list(sight.counts) or [1] * len(sight.moments)
    for site, (c_DD, g_DD) in enumerate(zip(sight.moments, sight.metrics, strict=True)):
        share_DD = g_DD * (counts[site] / (g_DD * c_DD).sum().clamp_min(1e-30))
        units_D1 = torch.arange(size, device=c_DD.device)[:, None]
        if site < refitted:
            hessian_DD = obs.damped(c_DD, OBS_DAMPING)
            problems.append(obs.Problem(_root(share_DD), hessian_DD, units_D1))
        else:
            each_D = (share_DD * c_DD).diagonal().clamp_min(0).sqrt()
            problems.append(obs.Problem(each_D.diag(), _eye(c_DD), units_D1))
    kept: Indices = obs.greedy(problems, size - width).kept(size, width).numpy()
    return kept


def _eye(like_DD: Tensor) -> Tensor:
    return torch.eye(len(like_DD), dtype=like_DD.dtype, device=like_DD.device)


def _root(matrix_DD: Tensor) -> Tensor:
    """M^(1/2) of a positive semi-definite M."""
    values_D, vectors_DD = torch.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    root_DD: Tensor = (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return root_DD


def _axis_dot(sight: Sight, width: int, options: TransportOptions) -> tuple[Array, Coupling]:
    """Keep the axes that OBS keeps, and let transport move each of the others into one of them.

    An axis goes where most of its mass goes, so every old axis lies in one new one at most. What
    a new one takes of its own is the leading eigenvector of their block of the mean moment: the one
    direction that says most of them, and all where they are multiples of one another.
    """
    moment_DD, kept_K = sight.mean(), _needed(sight, width)
    cost = activation_distance(moment_DD, kept_K)
    coupling = couple(cost, np.sqrt(np.maximum(np.diag(moment_DD), 0.0)), options)
    alike_NK = np.abs(cosine(moment_DD, kept_K))
    target_N = coupling.plan_NK.argmax(1)
    joins_N = alike_NK[np.arange(len(target_N)), target_N] >= LEAST_ALIKE
    matrix_DK = np.zeros((len(moment_DD), width))
    for column, axis in enumerate(kept_K):
        others_G = np.setdiff1d(np.flatnonzero(joins_N & (target_N == column)), kept_K)
        group_G = np.append(axis, others_G)
        vectors_GG = np.linalg.eigh(moment_DD[np.ix_(group_G, group_G)]).eigenvectors
        matrix_DK[group_G, column] = vectors_GG[:, -1] if len(others_G) else 1.0
    return _fixed_signs(matrix_DK), coupling


AXIS_METHODS: dict[str, Method] = {"dot": _axis_dot, "obs": _obs, "select": _select}


def methods_for(rotates: bool) -> dict[str, Method]:
    """The bases of a model whose residual stream can be rotated, or cannot."""
    return METHODS if rotates else AXIS_METHODS


def check_basis(method: str | None, architecture: str, *, rotates: bool) -> None:
    """Refuse a basis that such a model has not.

    Raises:
        UsageError: naming those it has.
    """
    known = methods_for(rotates)
    if method in (None, AUTO, *known):
        return
    why = (
        "chooses axes only, and the residual stream of this class can be rotated"
        if rotates
        else "rotates the residual stream, and this class normalises what sublayers add to it, "
        "which holds in its own axes only"
    )
    raise UsageError(
        f"basis {method} is not for {architecture}: it {why}; expected one of "
        f"{', '.join(sorted(known))}, or {AUTO}"
    )


def best_of(bases: dict[str, tuple[Basis, float]]) -> Basis:
    """The basis with the least held-out divergence, which remembers what the others had."""
    name = min(bases, key=lambda n: bases[n][1])
    return replace(bases[name][0], tried={n: kl for n, (_, kl) in bases.items()})


def _largest(moment_DD: Array, width: int) -> Indices:
    order = np.argsort(-np.diag(moment_DD), kind="stable")
    return np.sort(order[:width])


def _fixed_signs(matrix_DK: Array) -> Array:
    """Make each column's largest entry positive: eigenvectors and QR leave the sign open."""
    largest_K = np.abs(matrix_DK).argmax(0)
    signs_K = np.sign(matrix_DK[largest_K, np.arange(matrix_DK.shape[1])])
    oriented_DK: Array = matrix_DK * np.where(signs_K == 0, 1.0, signs_K)
    return oriented_DK
