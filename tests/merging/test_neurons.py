"""Which neurons stay, and what the others leave behind."""

from __future__ import annotations

import itertools

import pytest
import torch

from dotexport.merging.neurons import (
    Merge,
    barycentres,
    choose_by_magnitude,
    choose_by_obs,
    importance,
    transport,
)
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.merging.transport_options import TransportOptions

torch.manual_seed(0)
MIX_NN = torch.randn(8, 8, dtype=torch.float64) + 2 * torch.eye(8, dtype=torch.float64)
NEURONS_TN = torch.randn(300, 8, dtype=torch.float64) @ MIX_NN
WRITER_ON = torch.randn(5, 8, dtype=torch.float64)


def moments(neurons_TN: torch.Tensor = NEURONS_TN, writer_ON: torch.Tensor = WRITER_ON) -> Moments:
    sums = Moments.zeros(neurons_TN.shape[1], len(writer_ON))
    sums.add(neurons_TN, neurons_TN @ writer_ON.T)
    return sums


def loss_of(kept: list[int]) -> float:
    """Reconstruction loss when only these neurons stay and the writer is refitted."""
    subset = moments().of(torch.tensor(kept))
    return subset.loss(ridge_solve(subset, WRITER_ON[:, kept], 0.0))


def test_every_step_removes_the_neuron_whose_loss_is_least_when_all_others_are_refitted() -> None:
    """The slow reference solves one least-squares problem per candidate and step."""
    left = list(range(8))
    while len(left) > 3:
        left = min(([n for n in left if n != gone] for gone in left), key=loss_of)
        chosen = choose_by_obs(moments(), WRITER_ON, len(left), damping=1e-12)
        assert chosen.tolist() == left


def test_a_layer_in_which_nothing_fires_still_loses_its_neurons() -> None:
    silent = moments(torch.zeros(300, 8, dtype=torch.float64))
    assert len(choose_by_obs(silent, WRITER_ON, 5)) == 5


def test_the_choice_beats_that_by_magnitude_and_not_the_best_of_all_subsets() -> None:
    best = min(loss_of(list(kept)) for kept in itertools.combinations(range(8), 5))
    greedy = loss_of(choose_by_obs(moments(), WRITER_ON, 5).tolist())
    magnitude = loss_of(choose_by_magnitude(moments(), WRITER_ON, 5).tolist())
    assert best <= greedy < magnitude


def test_removing_several_at_once_is_close_to_removing_one_by_one() -> None:
    """More than 256 neurons leave in blocks; their joint downdate is exact, the order is not."""
    neurons_TN = torch.randn(2000, 600, dtype=torch.float64) @ torch.randn(600, 600).double()
    writer_ON = torch.randn(20, 600, dtype=torch.float64)
    sums = moments(neurons_TN, writer_ON)
    kept = choose_by_obs(sums, writer_ON, 450)
    assert len(kept) == 450
    assert kept.unique().tolist() == kept.tolist()
    obs, magnitude = (
        sums.of(k).loss(ridge_solve(sums.of(k), writer_ON[:, k], 1e-12))
        for k in (kept, choose_by_magnitude(sums, writer_ON, 450))
    )
    assert obs < magnitude


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_two_copies_one_leaves_and_the_other_takes_over_all_of_it(sign: float) -> None:
    twin_TN = NEURONS_TN.clone()
    twin_TN[:, 6] = sign * twin_TN[:, 1]
    sums = moments(twin_TN)
    kept = choose_by_obs(sums, WRITER_ON, 7)
    gone = (set(range(8)) - set(kept.tolist())).pop()
    assert gone in (1, 6)
    merge = barycentres(transport(sums, WRITER_ON, kept, TransportOptions()), least_cosine=0.9)
    assert merge.moved > 0.5
    up_KN = merge.rows("mlp", torch.eye(8))
    # The new up row is a mean of the two with the right sign: for copies, the kept one itself.
    up_TK = twin_TN @ up_KN.T
    torch.testing.assert_close(up_TK, twin_TN[:, kept])


def test_nothing_moves_where_no_neuron_resembles_another() -> None:
    apart_TN = torch.linalg.qr(torch.randn(300, 8, dtype=torch.float64)).Q
    sums, kept = moments(apart_TN), torch.arange(5)
    alike = transport(sums, WRITER_ON, kept, TransportOptions())
    merge = barycentres(alike, least_cosine=0.5)
    assert merge.moved == 0
    rows_NX = torch.randn(8, 3, dtype=torch.float64)
    for space in ("gate", "mlp"):
        assert torch.equal(merge.rows(space, rows_NX), Merge(kept).rows(space, rows_NX))


def test_gates_take_no_signs() -> None:
    twin_TN = NEURONS_TN.clone()
    twin_TN[:, 6] = -twin_TN[:, 1]
    sums, kept = moments(twin_TN), torch.arange(6)
    alike = transport(sums, WRITER_ON, kept, TransportOptions())
    merge = barycentres(alike, least_cosine=0.9)
    gate_KN, up_KN = (merge.rows(space, torch.eye(8)) for space in ("gate", "mlp"))
    assert gate_KN.min() >= 0
    assert up_KN[1, 6] < 0


def test_importance_is_rms_activation_times_outgoing_norm() -> None:
    expected_N = NEURONS_TN.square().mean(0).sqrt() * WRITER_ON.norm(dim=0)
    torch.testing.assert_close(importance(moments(), WRITER_ON), expected_N)
