"""Heads: which KV groups stay, and what the queries of the others leave behind in them.

A KV group is one key and value head with the query heads that read it; groups leave whole, because
rotary frequencies fix head_dim and every kept query head needs its keys. Targets are chosen by
Optimal Brain Surgeon on o_proj, group by group; query heads of removed groups may be transported
onto kept ones.

Shapes: N = heads x F features that enter o_proj, O its outputs, F features of a head (head_dim),
H query heads, J kept ones, P = F / 2 rotary planes, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dotexport.merging import obs
from dotexport.merging.neurons import MERGE_LEVELS
from dotexport.merging.ot.cost import Cost
from dotexport.merging.ot.coupling import Coupling, couple
from dotexport.merging.refit import Moments
from dotexport.merging.transport_options import TransportOptions
from dotexport.models.family import HEADS

DAMPING = 1e-9  # in units of the mean diagonal


@dataclass(frozen=True)
class Groups:
    """How the features of an attention sublayer are arranged, and what can leave of it (units.py).

    Attributes:
        count: KV groups.
        queries: query heads in each.
        head_dim: features of a head.
    """

    count: int
    queries: int
    head_dim: int
    tokenwise: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Features of one group that enter o_proj."""
        return self.queries * self.head_dim

    def columns(self, kept: Tensor) -> Tensor:
        """Features of o_proj that belong to these groups."""
        return _blocks(kept, self.width)

    def heads(self, kept: Tensor) -> Tensor:
        """Query heads of these groups."""
        return _blocks(kept, self.queries)

    def choose(self, method: str, moments: Moments, writer_ON: Tensor, count: int) -> Tensor:
        return choose_groups(method, moments, writer_ON, self, count)

    def alone(self, kept: Tensor) -> HeadMerge:
        return whole(self, kept)

    def merges(
        self,
        moments: Moments,
        writer_ON: Tensor,
        kept: Tensor,
        options: TransportOptions,
        keys_NN: Tensor | None,
    ) -> tuple[Coupling, Iterator[HeadMerge]]:
        assert keys_NN is not None
        return merges(moments, writer_ON, keys_NN, self, kept, options)


@dataclass(frozen=True)
class HeadMerge:
    """Kept groups, and the query rows that kept heads take over from removed ones.

    Attributes:
        kept: features of o_proj that stay, ascending.
        query_KN: new query rows as sums of old ones; None: the kept rows as they are.
        key_K: rows of k_proj and v_proj that stay.
        head_dim: features of a head.
        moved: share of the removed heads' importance that a target takes over.
    """

    kept: Tensor
    key_K: Tensor
    head_dim: int
    query_KN: Tensor | None = None
    moved: float = 0.0

    def stays(self, space: str) -> Tensor:
        """Features of `space` that stay; of `heads`, the query heads."""
        if space == HEADS:
            return self.kept[:: self.head_dim] // self.head_dim
        return self.key_K if space == "kv" else self.kept

    def rows(self, space: str, rows_NX: Tensor) -> Tensor:
        """New rows of a reader that writes into `space`."""
        if space == "kv":
            return rows_NX[self.key_K]
        if space == "gated_query":  # a gate is that of what its head gives, which stays
            query_NX, gate_NX = query_and_gate(rows_NX, self.head_dim)
            return head_by_head(self.rows("query", query_NX), gate_NX[self.kept], self.head_dim)
        return rows_NX[self.kept] if self.query_KN is None else self.query_KN @ rows_NX.double()


def whole(groups: Groups, kept: Tensor) -> HeadMerge:
    """The kept groups as they are."""
    return HeadMerge(groups.columns(kept), _blocks(kept, groups.head_dim), groups.head_dim)


def query_and_gate(rows_MX: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of all queries and of all gates, of which a matrix of both has a head's one behind the
    other; M = 2 N."""
    query_NX, gate_NX = rows_MX.unflatten(0, (-1, 2, head_dim)).unbind(1)
    return query_NX.flatten(0, 1), gate_NX.flatten(0, 1)


def head_by_head(query_NX: Tensor, gate_NX: Tensor, head_dim: int) -> Tensor:
    """The same rows in one matrix again."""
    heads = (rows_NX.unflatten(0, (-1, head_dim)) for rows_NX in (query_NX, gate_NX))
    return torch.stack(tuple(heads), 1).flatten(0, 2)


def choose_groups(
    method: str, moments: Moments, writer_ON: Tensor, groups: Groups, count: int
) -> Tensor:
    """Indices of the groups that stay, ascending: by magnitude for `select`, else by group OBS."""
    if method == "select":
        return _by_magnitude(moments, writer_ON, groups, count)
    return _by_obs(moments, writer_ON, groups, count)


def _by_magnitude(moments: Moments, writer_ON: Tensor, groups: Groups, count: int) -> Tensor:
    """Baseline: the groups that contribute most, each looked at alone."""
    energy_G = torch.tensor(_contributions(moments, writer_ON, _each(groups)))
    return torch.argsort(energy_G, descending=True, stable=True)[:count].sort().values


def _by_obs(moments: Moments, writer_ON: Tensor, groups: Groups, count: int) -> Tensor:
    """Greedy group OBS: remove argmin tr(W_S (G_SS)^-1 W_S^T), update, repeat.

    G is the inverse of the damped Gram matrix and S the features of one group, so a score is
    the exact increase of the reconstruction loss when that group leaves and all else is refitted.
    """
    columns_GS, leaving = torch.stack(_each(groups)).to(writer_ON.device), groups.count - count
    removal = obs.greedy_inputs(moments, writer_ON, columns_GS, leaving, damping=DAMPING)
    return removal.kept(groups.count, count).to(writer_ON.device)


def _contributions(moments: Moments, writer_ON: Tensor, each: list[Tensor]) -> list[float]:
    """Energy of what each of these features add to the stream: tr(W_S C_SS W_S^T)."""
    inputs_NN = moments.inputs.full()
    found = []
    for columns in each:
        w_OS = writer_ON[:, columns].double()
        found.append(float(((w_OS @ inputs_NN[columns][:, columns]) * w_OS).sum()))
    return found


# Query heads of removed groups ------------------------------------------------------------------


def merges(
    moments: Moments,
    writer_ON: Tensor,
    keys_NN: Tensor,
    groups: Groups,
    kept: Tensor,
    options: TransportOptions,
) -> tuple[Coupling, Iterator[HeadMerge]]:
    """The transport of all query heads onto the kept ones, and merges from strict to loose.

    Args:
        moments: of the features that enter o_proj.
        writer_ON: what o_proj does with them.
        keys_NN: second moment of the keys before rotation, (groups x F, groups x F).
    """
    coupling = _transport(moments, writer_ON, groups, kept, options)
    alike_HJ = 1 - _unexplained(moments, groups)[:, groups.heads(kept).cpu().numpy()]

    def loosened() -> Iterator[HeadMerge]:
        moved = 0.0
        for level in MERGE_LEVELS:
            merge = _merge(coupling, alike_HJ >= level, keys_NN, groups, kept)
            if merge.moved > moved:
                yield merge
            moved = merge.moved

    return coupling, loosened()


def _transport(
    moments: Moments, writer_ON: Tensor, groups: Groups, kept: Tensor, options: TransportOptions
) -> Coupling:
    """Cost: the share of a head's output that is no linear function of the target's output.

    A head's values have axes of their own, so outputs of two heads are compared up to a linear map;
    o_proj, which is refitted behind them, supplies it.
    """
    cost_HJ = np.sqrt(_unexplained(moments, groups)[:, groups.heads(kept).cpu().numpy()])
    largest = cost_HJ.max(initial=0.0)
    signs_HJ = np.ones_like(cost_HJ)
    energy_H = _contributions(moments, writer_ON, _each_head(groups))
    scaled_HJ = cost_HJ / largest if largest > 0 else cost_HJ
    return couple(Cost(scaled_HJ, signs_HJ), np.sqrt(np.maximum(energy_H, 0.0)), options)


def _unexplained(moments: Moments, groups: Groups) -> np.ndarray:
    """(H, H): share of head h's energy that least squares from head j leaves over; 0 on itself."""
    columns, inputs_NN = _each_head(groups), moments.inputs.full()
    grams = [inputs_NN[c][:, c] for c in columns]
    left_HH = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for j, (source, gram_FF) in enumerate(zip(columns, grams, strict=True)):
        damped_FF = gram_FF + gram_FF.diagonal().mean().clamp_min(1e-30) * DAMPING * _eye(gram_FF)
        for h, target in enumerate(columns):
            cross_FF = inputs_NN[target][:, source]
            explained = (torch.linalg.solve(damped_FF, cross_FF.T).T * cross_FF).sum()
            left_HH[h, j] = 1 - explained / grams[h].trace().clamp_min(1e-30)
    left_HH.fill_diagonal_(0.0)
    return left_HH.clamp(0.0, 1.0).numpy()


def _merge(
    coupling: Coupling, allowed_HJ: np.ndarray, keys_NN: Tensor, groups: Groups, kept: Tensor
) -> HeadMerge:
    """Query rows of kept heads as barycentres of themselves and the heads moved into them."""
    heads_J = groups.heads(kept).cpu().numpy()
    plan_HJ = np.where(allowed_HJ, coupling.plan_NK, 0.0)
    plan_HJ[heads_J] = 0.0  # a target gives nothing away
    moved = plan_HJ.sum()
    plan_HJ[heads_J, np.arange(len(heads_J))] = np.maximum(coupling.mass_N[heads_J], 1e-300)
    share_HJ = plan_HJ / plan_HJ.sum(0, keepdims=True)
    alone = whole(groups, kept)
    size, f = groups.count * groups.width, groups.head_dim
    query_KN = torch.zeros(len(alone.kept), size, dtype=torch.float64, device=kept.device)
    for head, target in zip(*share_HJ.nonzero(), strict=True):
        turn_FF = _realign(keys_NN, head // groups.queries, heads_J[target] // groups.queries, f)
        block = (slice(target * f, (target + 1) * f), slice(head * f, (head + 1) * f))
        query_KN[block] = float(share_HJ[head, target]) * turn_FF
    removed = np.delete(coupling.mass_N, heads_J).sum()
    share = float(moved / removed) if removed > 0 else 0.0
    return HeadMerge(alone.kept, alone.key_K, f, query_KN, share)


def _realign(keys_NN: Tensor, group: int, target: int, head_dim: int) -> Tensor:
    """Matrix (F, F) that turns a query for keys of `group` into one for keys of `target`.

    Keys are complex numbers, one per rotary plane (features i and i + F/2), and rotary position
    embedding multiplies them by a phase. So k ~ b k' with b = E[k conj k'] / E|k'|^2 holds at every
    position alike, and q conj(b) meets k' as q meets k.
    """
    if group == target:
        return torch.eye(head_dim, dtype=torch.float64, device=keys_NN.device)
    one, other = (slice(g * head_dim, (g + 1) * head_dim) for g in (group, target))
    cross_FF, own_F = keys_NN[one, other], keys_NN[other, other].diagonal()
    p = head_dim // 2
    energy_P = (own_F[:p] + own_F[p:]).clamp_min(1e-30)
    real_P = (cross_FF[:p, :p] + cross_FF[p:, p:]).diagonal() / energy_P
    imag_P = (cross_FF[p:, :p] - cross_FF[:p, p:]).diagonal() / energy_P
    return torch.cat(
        [
            torch.cat([real_P.diag(), imag_P.diag()], 1),
            torch.cat([-imag_P.diag(), real_P.diag()], 1),
        ]
    )


# Indices ----------------------------------------------------------------------------------------


def _blocks(units: Tensor, width: int) -> Tensor:
    steps = torch.arange(width, device=units.device)
    return (units[:, None] * width + steps).flatten()


def _each(groups: Groups) -> list[Tensor]:
    return _cut(groups.count, groups.width)


def _each_head(groups: Groups) -> list[Tensor]:
    return _cut(groups.count * groups.queries, groups.head_dim)


def _cut(count: int, width: int) -> list[Tensor]:
    return [torch.arange(a, b) for a, b in pairwise(range(0, count * width + 1, width))]


def _eye(like_FF: Tensor) -> Tensor:
    return torch.eye(len(like_FF), dtype=like_FF.dtype, device=like_FF.device)
