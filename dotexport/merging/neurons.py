"""MLP width: which neurons stay, and what the others leave behind in them.

Targets are chosen by Optimal Brain Surgeon on the writer (down_proj); the removed neurons are
transported onto them, and their gate and up rows become barycentres. A merge is kept only if
the reconstruction of held-out windows improves.

Shapes: N neurons before, K neurons after, B of the N, O outputs of the writer, T tokens, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dotexport.merging import obs
from dotexport.merging.ot.cost import (
    Array,
    Indices,
    activation_distance,
    cosine,
    cosines,
    distance,
    largest_distance,
    norms,
)
from dotexport.merging.ot.coupling import Coupling, Summary, couple, semi_relaxed, shares
from dotexport.merging.refit import Moments
from dotexport.merging.transport_options import TransportOptions

# Smallest |cosine| at which a removed neuron may move into a kept one, strictest first.
MERGE_LEVELS = (0.9, 0.7, 0.5)
ROWS = 128  # of a plan at once


@dataclass(frozen=True)
class Merge:
    """Combination of the N old neurons into K new ones.

    Attributes:
        kept: indices of the targets, ascending.
        shares: what the new rows of the readers are made of; None: the kept rows as they are.
        moved: share of the removed neurons' importance that a target takes over.
    """

    kept: Tensor
    shares: Shares | None = None
    moved: float = 0.0

    def rows(self, space: str, rows_NX: Tensor) -> Tensor:
        """New rows of a reader that writes into `space`: `gate` behind the nonlinearity takes no
        signs, the rest does."""
        if self.shares is None:
            return rows_NX[self.kept]
        return self.shares.of(rows_NX, signed=space != "gate")

    def stays(self, space: str) -> Tensor:
        return self.kept


@dataclass(frozen=True)
class Shares:
    """What K neurons are made of: M pairs of a target and one of N sources.

    Attributes:
        share_M: with the sign with which the source stands for the target.
        turns: how many pairs each turn has: the first source of every target, then the second of
            those that have one, and so on. Pairs lie in this order.
    """

    shape: tuple[int, int]
    pair_2M: Tensor
    share_M: Tensor
    turns: tuple[int, ...]

    @classmethod
    def between(
        cls, targets: int, sources: int, pair_2M: Indices, share_M: Array, place: Any
    ) -> Shares:
        """Args: place: the device."""
        by_target_M = np.argsort(pair_2M[0], kind="stable")
        count_K = np.bincount(pair_2M[0], minlength=targets)
        turn_M = np.arange(len(by_target_M)) - np.repeat(count_K.cumsum() - count_K, count_K)
        order_M = by_target_M[np.argsort(turn_M, kind="stable")]
        pair, share = (torch.from_numpy(x[..., order_M]).to(place) for x in (pair_2M, share_M))
        return cls((targets, sources), pair, share, tuple(np.bincount(turn_M).tolist()))

    def of(self, rows_NX: Tensor, *, signed: bool) -> Tensor:
        """Rows of the targets, (K, X) in float64, summed in one order wherever that is."""
        weight_M = self.share_M if signed else self.share_M.abs()
        shape = (self.shape[0], *rows_NX.shape[1:])
        found_KX = torch.zeros(shape, dtype=torch.float64, device=rows_NX.device)
        turns = zip(self.pair_2M.split(self.turns, 1), weight_M.split(self.turns), strict=True)
        for (target, source), weight in turns:
            share = weight.view(-1, *(1 for _ in shape[1:]))
            found_KX[target] += share * rows_NX[source].double()
        return found_KX


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
    ) -> tuple[Summary, Iterator[Merge]]:
        return merges(moments, writer_ON, kept, options)


@dataclass(frozen=True)
class Channels(Neurons):
    """Those of a short convolution: what one gives is a product of three, and of more tokens than
    one, so the kept ones stay as they are."""

    tokenwise: ClassVar[bool] = False


def choose(method: str, moments: Moments, writer_ON: Tensor, width: int) -> Tensor:
    """Indices of the neurons that stay, ascending: by magnitude for `select`, else by OBS."""
    chooser = choose_by_magnitude if method == "select" else choose_by_obs
    return chooser(moments, writer_ON, width)


def importance(moments: Moments, writer_ON: Tensor) -> Tensor:
    """rms activation x norm of the outgoing weights, per neuron."""
    rms_N = (moments.inputs.diagonal() / max(moments.count, 1)).clamp_min(0).sqrt()
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
    each_N1 = torch.arange(moments.inputs.width, device=writer_ON.device)[:, None]
    removal = obs.greedy_inputs(moments, writer_ON, each_N1, len(each_N1) - width, damping=damping)
    return removal.kept(len(each_N1), width).to(writer_ON.device)


def merges(
    moments: Moments, writer_ON: Tensor, kept: Tensor, options: TransportOptions
) -> tuple[Summary, Iterator[Merge]]:
    """The transport of all neurons onto the kept ones, and merges from strict to loose."""
    alike = transport(moments, writer_ON, kept, options)
    return alike.summary, loosened(alike)


def loosened(alike: Alike) -> Iterator[Merge]:
    """Merges from strict to loose, each of which moves more than the one before."""
    moved = 0.0
    for level in MERGE_LEVELS:
        merge = barycentres(alike, least_cosine=level)
        if merge.moved > moved:
            yield merge
        moved = merge.moved


@dataclass(frozen=True)
class Alike:
    """Where a plan moves removed neurons onto kept ones that resemble them: M pairs.

    The plan as a whole has an entry for every pair of neurons, which for a wide MLP are more than
    memory holds.

    Attributes:
        source_M, target_M: a neuron, and which of the kept ones; each kept one is its own target.
        mass_M: what is moved.
        cosine_M: between their activations, without its sign.
        sign_M: with which the one stands for the other.
    """

    kept: Tensor
    mass_N: Array
    summary: Summary
    source_M: Indices
    target_M: Indices
    mass_M: Array
    cosine_M: Array
    sign_M: Array

    @classmethod
    def of(cls, kept: Tensor, mass_N: Array, blocks: Iterable[tuple[Array, Coupling]]) -> Alike:
        """Args: blocks: cosines and plan of some rows after others."""
        kept_K, target_N = kept.cpu().numpy(), np.full(len(mass_N), -1)
        target_N[kept_K] = np.arange(len(kept_K))
        found = []

        def seen() -> Iterator[Coupling]:
            first = 0
            for cosine_BK, plan in blocks:
                found.append(_pairs(np.abs(cosine_BK), plan, target_N, first))
                first += len(cosine_BK)
                yield plan

        summary = Summary.of(seen())
        return cls(kept, mass_N, summary, *map(np.concatenate, zip(*found, strict=True)))


def _pairs(alike_BK: Array, plan: Coupling, target_N: Indices, first: int) -> tuple[Any, ...]:
    """Pairs among rows from `first` on; a target gives nothing away."""
    target_B = target_N[first : first + len(alike_BK)]
    own_B = np.flatnonzero(target_B >= 0)
    listed_BK = alike_BK >= MERGE_LEVELS[-1]
    listed_BK[own_B] = False
    listed_BK[own_B, target_B[own_B]] = True
    source_M, target_M = listed_BK.nonzero()
    own_M = target_B[source_M] >= 0
    mass_M = np.where(
        own_M, np.maximum(plan.mass_N[source_M], 1e-300), plan.plan_NK[source_M, target_M]
    )
    cosine_M = np.where(own_M, 1.0, alike_BK[source_M, target_M])
    return source_M + first, target_M, mass_M, cosine_M, plan.sign_NK[source_M, target_M]


def transport(
    moments: Moments, writer_ON: Tensor, kept: Tensor, options: TransportOptions
) -> Alike:
    """Move all neurons onto the kept ones; up rows may flip their sign, gate rows may not.

    The sign is that of the neurons' activations, silu(g.x) (u.x), which is odd in u alone.
    """
    mass_N, kept_K = importance(moments, writer_ON).cpu().numpy(), kept.cpu().numpy()
    if options.plan == "balanced":  # no row is free of the others
        gram_NN = moments.inputs.full().cpu().numpy()
        coupling = couple(activation_distance(gram_NN, kept_K), mass_N, options)
        return Alike.of(kept, coupling.mass_N, [(cosine(gram_NN, kept_K), coupling)])
    mass_N = shares(mass_N)
    norm_N = norms(moments.inputs.diagonal().cpu().numpy())

    def blocks() -> Iterator[tuple[Indices, Array]]:
        for some in torch.arange(len(mass_N), device=kept.device).split(ROWS):
            gram_BK, rows = moments.inputs.rows(some)[:, kept].cpu().numpy(), some.cpu().numpy()
            yield rows, cosines(gram_BK, norm_N[rows], norm_N[kept_K])

    largest = max(largest_distance(cosine_BK) for _, cosine_BK in blocks())

    def plans() -> Iterator[tuple[Array, Coupling]]:
        for rows, cosine_BK in blocks():
            cost = distance(cosine_BK, largest)
            yield cosine_BK, semi_relaxed(cost, mass_N[rows], epsilon=options.epsilon)

    return Alike.of(kept, mass_N, plans())


def barycentres(alike: Alike, *, least_cosine: float) -> Merge:
    """New reader rows: kept neurons plus those removed ones that resemble their target enough."""
    some = alike.cosine_M >= least_cosine
    source_M, target_M, mass_M = alike.source_M[some], alike.target_M[some], alike.mass_M[some]
    kept_K = alike.kept.cpu().numpy()
    total_K = np.bincount(target_M, mass_M, minlength=len(kept_K))
    removed = np.delete(alike.mass_N, kept_K).sum()
    moved = mass_M[kept_K[target_M] != source_M].sum()
    made = Shares.between(
        len(kept_K),
        len(alike.mass_N),
        np.stack([target_M, source_M]),
        mass_M / total_K[target_M] * alike.sign_M[some],
        alike.kept.device,
    )
    return Merge(alike.kept, made, float(moved / removed) if removed > 0 else 0.0)
