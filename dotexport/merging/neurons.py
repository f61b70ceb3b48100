"""MLP width: which neurons stay, and what the others leave behind in them.

Targets are chosen by Optimal Brain Surgeon on the writer (down_proj); the removed neurons are
transported onto them, and their gate and up rows become barycentres. A merge is kept only if
the reconstruction of held-out windows improves.

Shapes: N neurons before, K neurons after, O outputs of the writer, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dotexport.merging import obs
from dotexport.merging.ot.cost import activation_distance, cosine
from dotexport.merging.ot.coupling import Coupling, couple
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.merging.transport_options import TransportOptions

# Smallest |cosine| at which a removed neuron may move into a kept one, strictest first.
MERGE_LEVELS = (0.9, 0.7, 0.5)


@dataclass(frozen=True)
class Merge:
    """Combination of the N old neurons into K new ones.

    Attributes:
        kept: indices of the targets, ascending.
        gate_KN, up_KN: rows of the new readers as weighted sums of the old ones; None: the kept
            rows as they are.
        moved: share of the removed neurons' importance that a target takes over.
    """

    kept: Tensor
    gate_KN: Tensor | None = None
    up_KN: Tensor | None = None
    moved: float = 0.0

    def rows(self, space: str, rows_NX: Tensor) -> Tensor:
        """New rows of a reader: `gate` behind the nonlinearity takes no signs, the rest does."""
        mix_KN = self.gate_KN if space == "gate" else self.up_KN
        return rows_NX[self.kept] if mix_KN is None else mix_KN @ rows_NX.double()

    def stays(self, space: str) -> Tensor:
        return self.kept


@dataclass(frozen=True)
class Neurons:
    """The neurons of an MLP (units.py)."""

    count: int
    width: ClassVar[int] = 1
    tokenwise: ClassVar[bool] = True

    def choose(self, method: str, moments: Moments, writer_ON: Tensor, count: int) -> Tensor:
        return choose(method, moments, writer_ON, count)

    def alone(self, kept: Tensor) -> Merge:
        return Merge(kept)

    def merges(
        self,
        moments: Moments,
        writer_ON: Tensor,
        kept: Tensor,
        options: TransportOptions,
        keys_NN: Tensor | None,
    ) -> tuple[Coupling, Iterator[Merge]]:
        return merges(moments, writer_ON, kept, options)


def choose(method: str, moments: Moments, writer_ON: Tensor, width: int) -> Tensor:
    """Indices of the neurons that stay, ascending: by magnitude for `select`, else by OBS."""
    chooser = choose_by_magnitude if method == "select" else choose_by_obs
    return chooser(moments, writer_ON, width)


def importance(moments: Moments, writer_ON: Tensor) -> Tensor:
    """rms activation x norm of the outgoing weights, per neuron."""
    rms_N = (moments.inputs_II.diagonal() / max(moments.count, 1)).clamp_min(0).sqrt()
    importance_N: Tensor = rms_N * writer_ON.double().norm(dim=0)
    return importance_N


def choose_by_magnitude(moments: Moments, writer_ON: Tensor, width: int) -> Tensor:
    """Baseline: the neurons that contribute most, each looked at alone."""
    order = torch.argsort(importance(moments, writer_ON), descending=True, stable=True)
    return order[:width].sort().values


def choose_by_obs(
    moments: Moments, writer_ON: Tensor, width: int, *, damping: float = 1e-9
) -> Tensor:
    """Greedy Optimal Brain Surgeon: remove argmin |w_i|^2 / [H^-1]_ii, update, repeat.

    H is the damped Gram matrix of the neurons and w_i the column of the least-squares writer, so a
    score is the exact increase of the reconstruction loss when one neuron leaves and all others
    are refitted.
    """
    size = len(moments.inputs_II)
    problem = obs.Problem(
        ridge_solve(moments, writer_ON.double(), damping),
        obs.damped(moments.inputs_II / max(moments.count, 1), damping),
        torch.arange(size, device=writer_ON.device)[:, None],
    )
    kept: Tensor = obs.greedy([problem], size - width).kept(size, width)
    return kept.to(writer_ON.device)


def merges(
    moments: Moments, writer_ON: Tensor, kept: Tensor, options: TransportOptions
) -> tuple[Coupling, Iterator[Merge]]:
    """The transport of all neurons onto the kept ones, and merges from strict to loose."""
    coupling = transport(moments, writer_ON, kept, options)

    def loosened() -> Iterator[Merge]:
        moved = 0.0
        for level in MERGE_LEVELS:
            merge = barycentres(moments.inputs_II, coupling, kept, least_cosine=level)
            if merge.moved > moved:
                yield merge
            moved = merge.moved

    return coupling, loosened()


def transport(
    moments: Moments, writer_ON: Tensor, kept: Tensor, options: TransportOptions
) -> Coupling:
    """Move all neurons onto the kept ones; up rows may flip their sign, gate rows may not.

    The sign is that of the neurons' activations, silu(g.x) (u.x), which is odd in u alone.
    """
    cost = activation_distance(moments.inputs_II.cpu().numpy(), kept.cpu().numpy())
    return couple(cost, importance(moments, writer_ON).cpu().numpy(), options)


def barycentres(
    inputs_NN: Tensor, coupling: Coupling, kept: Tensor, *, least_cosine: float
) -> Merge:
    """New reader rows: kept neurons plus those removed ones that resemble their target enough.

    Two neurons resemble each other by the cosine of their activations; `inputs_NN` is their Gram
    matrix.
    """
    kept_K = kept.cpu().numpy()
    alike_NK = np.abs(cosine(inputs_NN.cpu().numpy(), kept_K)) >= least_cosine
    own_NK = np.zeros_like(alike_NK)
    own_NK[kept_K, np.arange(len(kept_K))] = True
    alike_NK[kept_K] = False  # a target gives nothing away
    plan_NK = np.where(alike_NK | own_NK, coupling.plan_NK, 0.0)
    plan_NK[own_NK] = np.maximum(coupling.mass_N[kept_K], 1e-300)
    share_NK = plan_NK / plan_NK.sum(0, keepdims=True)
    removed_N = np.ones(len(inputs_NN), dtype=bool)
    removed_N[kept_K] = False
    mass = coupling.mass_N[removed_N].sum()
    moved = float(plan_NK[removed_N].sum() / mass) if mass > 0 else 0.0
    gate_KN = torch.from_numpy(share_NK.T.copy()).to(inputs_NN.device)
    up_KN = torch.from_numpy((share_NK * coupling.sign_NK).T.copy()).to(gate_KN.device)
    return Merge(kept, gate_KN, up_KN, moved)
