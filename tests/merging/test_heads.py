"""Which KV groups stay, and what the queries of the others may leave behind."""

from __future__ import annotations

import itertools

import torch

from dotexport.merging.heads import Groups, _realign, choose_groups, merges, whole
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.merging.transport_options import TransportOptions

GROUPS = Groups(count=4, queries=2, head_dim=4)
RANDOM = torch.Generator().manual_seed(0)
SIZE = GROUPS.count * GROUPS.width


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


FEATURES_TN = noise(500, SIZE) @ (noise(SIZE, SIZE) + 3 * torch.eye(SIZE, dtype=torch.float64))
WRITER_ON = noise(6, SIZE)


def moments(features_TN: torch.Tensor = FEATURES_TN) -> Moments:
    sums = Moments.zeros(SIZE, len(WRITER_ON))
    sums.add(features_TN, features_TN @ WRITER_ON.T)
    return sums


def loss_of(kept: tuple[int, ...]) -> float:
    """Reconstruction loss when only these groups stay and o_proj is refitted."""
    columns = GROUPS.columns(torch.tensor(kept))
    subset = moments().of(columns)
    return subset.loss(ridge_solve(subset, WRITER_ON[:, columns], 0.0))


def test_every_step_removes_the_group_whose_loss_is_least_when_all_else_is_refitted() -> None:
    left = tuple(range(4))
    while len(left) > 1:
        left = min(itertools.combinations(left, len(left) - 1), key=loss_of)
        chosen = choose_groups("obs", moments(), WRITER_ON, GROUPS, len(left))
        assert tuple(chosen.tolist()) == left


def test_groups_by_magnitude_are_those_that_add_most_to_the_stream() -> None:
    loud_TN = FEATURES_TN.clone()
    loud_TN[:, GROUPS.columns(torch.tensor([1, 2]))] *= 100
    assert choose_groups("select", moments(loud_TN), WRITER_ON, GROUPS, 2).tolist() == [1, 2]


def test_a_kept_group_keeps_its_queries_keys_and_columns() -> None:
    merge = whole(GROUPS, torch.tensor([1, 3]))
    assert merge.kept.tolist() == [*range(8, 16), *range(24, 32)]
    rows_NX = torch.arange(SIZE)[:, None]
    assert merge.rows("query", rows_NX).flatten().tolist() == merge.kept.tolist()
    assert merge.rows("kv", rows_NX[:16]).flatten().tolist() == [*range(4, 8), *range(12, 16)]


def rotary(vectors_TF: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in the half-split form of transformers."""
    p = vectors_TF.shape[1] // 2
    angle_TP = positions_T[:, None] * torch.tensor([1.0, 0.1])[:p]
    a_TP, b_TP = vectors_TF[:, :p], vectors_TF[:, p:]
    turned = (
        a_TP * angle_TP.cos() - b_TP * angle_TP.sin(),
        b_TP * angle_TP.cos() + a_TP * (angle_TP.sin()),
    )
    return torch.cat(turned, 1)


def test_a_realigned_query_scores_the_targets_keys_as_it_scored_its_own() -> None:
    """One group's keys are the other's, turned and scaled per rotary plane; at any position."""
    factor_P = torch.polar(torch.tensor([1.5, 0.7]), torch.tensor([0.4, -2.0])).to(torch.complex128)
    target_TF = noise(200, 4)
    turned_TP = torch.complex(target_TF[:, :2], target_TF[:, 2:]) * factor_P
    own_TF = torch.cat([turned_TP.real, turned_TP.imag], 1)
    keys_TN = torch.cat([own_TF, target_TF], 1)
    query_1F, at_T = noise(1, 4), torch.arange(200.0).double()
    realigned_1F = query_1F @ _realign(keys_TN.T @ keys_TN, 0, 1, 4).T
    here_1 = torch.tensor([250.0]).double()
    own, other = (
        rotary(q_1F, here_1) @ rotary(k_TF, at_T).T
        for q_1F, k_TF in ((query_1F, own_TF), (realigned_1F, target_TF))
    )
    torch.testing.assert_close(other, own)


def test_heads_that_compute_the_same_are_merged_and_others_are_not() -> None:
    """Head 7, of the removed group 3, is a linear map of head 0; head 6 is like none."""
    features_TN, keys_TN = noise(500, SIZE), noise(500, 16)
    features_TN[:, 28:32] = features_TN[:, 0:4] @ noise(4, 4)
    keys_TN[:, 12:16] = keys_TN[:, 0:4]
    coupling, candidates = merges(
        moments(features_TN),
        WRITER_ON,
        keys_TN.T @ keys_TN,
        GROUPS,
        torch.tensor([0, 1, 2]),
        TransportOptions(epsilon=0.0),
    )
    strictest = next(iter(candidates))
    assert coupling.plan_NK[7].argmax() == 0
    assert 0 < strictest.moved < 1
    assert strictest.query_KN is not None
    own_FF, taken_FF = strictest.query_KN[:4, :4], strictest.query_KN[:4, 28:32]
    assert 0 < taken_FF[0, 0] < 1
    torch.testing.assert_close(own_FF + taken_FF, torch.eye(4, dtype=torch.float64))
    assert strictest.query_KN[:, 24:28].abs().max() == 0
