"""Optimal Brain Surgeon: every score is a loss, every update is least squares, and the order does
not depend on how many groups leave per step. References solve for the weights of what is kept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dotexport.merging import obs

N, S, OUT, T = 6, 3, 5, 400  # groups, columns of a group, outputs, tokens


def tokens(num_in: int = N * S) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    mixed_II = torch.randn(num_in, num_in, generator=rng, dtype=torch.float64)
    return torch.randn(T, num_in, generator=rng, dtype=torch.float64) @ mixed_II + 1


def weights(num_in: int = N * S) -> Tensor:
    return torch.randn(OUT, num_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def problem(
    x_TI: Tensor,
    weight_OI: Tensor,
    groups_NS: Tensor | None = None,
    damping: float = 1e-8,
    silent_I: Tensor | None = None,
) -> obs.Problem:
    """Groups of S columns side by side, where no others are given."""
    if groups_NS is None:
        groups_NS = torch.arange(x_TI.shape[1]).view(-1, S)
    hessian_II = obs.damped(x_TI.T @ x_TI / len(x_TI), damping)
    return obs.Problem(weight_OI, hessian_II, groups_NS, silent_I)


def true_loss(asked: obs.Problem, gone: list[int]) -> float:
    """Loss of the best weights without these groups, by solving for them."""
    stays_I = torch.ones(asked.weight_OI.shape[1], dtype=torch.bool)
    stays_I[asked.groups_NS[gone].flatten()] = False
    best_OI = torch.zeros_like(asked.weight_OI)
    right_KO = (asked.hessian_II @ asked.weight_OI.T)[stays_I]
    best_OI[:, stays_I] = torch.linalg.solve(asked.hessian_II[stays_I][:, stays_I], right_KO).T
    return obs.loss(asked.weight_OI, best_OI, asked.hessian_II)


@pytest.mark.parametrize("size", [1, 2, S])
def test_a_score_is_the_loss_of_refitting_without_the_group(size: int) -> None:
    asked = problem(tokens(), weights(), torch.arange(N * S).view(-1, size))
    expected_N = [true_loss(asked, [n]) for n in range(len(asked.groups_NS))]
    # Both invert a Hessian whose condition is about 1e5, in float64.
    torch.testing.assert_close(
        obs.scores([asked]), torch.tensor(expected_N, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_wide_groups_are_scored_by_several_threads_as_by_one() -> None:
    """MKL fails on a batch of matrices as large as those of three heads of 64."""
    asked = problem(tokens(3 * 192), weights(3 * 192), torch.arange(3 * 192).view(3, 192), 1e-2)
    threads = torch.get_num_threads()
    one_N = obs.scores([asked])
    torch.set_num_threads(2)
    try:
        two_N = obs.scores([asked])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two_N, one_N, rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_losses_of_removals_add_up_to_the_loss_of_all_however_many_leave_at_once(
    block: int,
) -> None:
    asked = problem(tokens(), weights())
    removal = obs.greedy([asked], N - 1, block=block)
    assert len(set(removal.order)) == N - 1
    for count, found in enumerate(removal.losses, start=1):
        expected = true_loss(asked, list(removal.order[:count]))
        assert found == pytest.approx(expected, rel=1e-6)  # the condition again


def test_every_step_takes_the_group_that_all_layers_together_miss_least() -> None:
    """Against a search over all groups that are left; either layer alone chooses otherwise."""
    layers = [problem(tokens(), weights()), problem(tokens().flip(1), weights())]
    gone: list[int] = []
    while len(gone) < N - 1:
        left = [n for n in range(N) if n not in gone]
        gone.append(min(left, key=lambda n: sum(true_loss(p, [*gone, n]) for p in layers)))
    removal = obs.greedy(layers, N - 1)
    assert list(removal.order) == gone
    assert removal.losses[-1] == pytest.approx(sum(true_loss(p, gone) for p in layers), rel=1e-6)
    assert removal.order not in [obs.greedy([layer], N - 1).order for layer in layers]


def test_in_blocks_the_same_groups_leave_in_the_same_order_as_one_by_one() -> None:
    """Columns resemble each other so little that what leaves a step later was cheap before."""
    rng = torch.Generator().manual_seed(3)
    mix_II = torch.eye(96) + 0.05 * torch.randn(96, 96, generator=rng)
    x_TI = torch.randn(4000, 96, generator=rng, dtype=torch.float64) @ mix_II.double()
    asked = problem(x_TI, weights(96), torch.arange(96).view(-1, 2))
    slow, fast = obs.greedy([asked], 36, block=1), obs.greedy([asked], 36, block=4)
    assert fast.order == slow.order
    # Downdates by one and by four groups differ in rounding only.
    assert fast.losses == pytest.approx(slow.losses, rel=1e-9)


def test_blocks_choose_about_as_well_as_one_by_one_where_columns_say_the_same() -> None:
    asked = problem(tokens(64), weights(64), torch.arange(64)[:, None])
    slow, fast = obs.greedy([asked], 32, block=1), obs.greedy([asked], 32, block=4)
    assert fast.losses[-1] == pytest.approx(true_loss(asked, list(fast.order)), rel=1e-6)
    # A group beyond the four times four cheapest may have become the best; it is never by much.
    assert fast.losses[-1] <= 1.2 * slow.losses[-1]


def test_copies_never_leave_together_even_where_several_columns_leave_at_once() -> None:
    """520 columns leave in blocks of two; 100 of them are copies, and only copies should go."""
    rng = torch.Generator().manual_seed(4)
    distinct_TI = torch.randn(1000, 420, generator=rng, dtype=torch.float64)
    twice_TI = torch.cat([distinct_TI, distinct_TI[:, :100]], dim=1)
    asked = problem(twice_TI, weights(520), torch.arange(520)[:, None])
    kept = obs.greedy([asked], 100).kept(520, 420)
    # Each of the 420 things that are said is still said by someone.
    assert sorted(torch.where(kept < 420, kept, kept - 420).tolist()) == list(range(420))


def test_a_group_leaves_whole_wherever_its_columns_lie() -> None:
    """The same groups with their columns strewn over the layer: same order, same losses."""
    x_TI, weight_OI = tokens(), weights()
    strewn = torch.randperm(N * S, generator=torch.Generator().manual_seed(5))
    moved = problem(x_TI[:, strewn], weight_OI[:, strewn], strewn.argsort().view(-1, S))
    together, apart = (obs.greedy([p], N - 1) for p in (problem(x_TI, weight_OI), moved))
    assert apart.order == together.order
    assert apart.losses == pytest.approx(together.losses, rel=1e-6)  # the condition again


def test_columns_in_no_group_stay_and_take_over_what_they_can() -> None:
    """The first six columns are in no group; of a copy of two of them nothing is missed."""
    x_TI, weight_OI = tokens(), weights()
    x_TI[:, 6:8] = x_TI[:, 0:2]
    asked = problem(x_TI, weight_OI, torch.arange(6, N * S).view(-1, 2))
    removal = obs.greedy([asked], len(asked.groups_NS))
    energy = obs.loss(weight_OI, 0 * weight_OI, asked.hessian_II)
    assert removal.order[0] == 0
    assert removal.losses[0] < 1e-7 * energy  # the damping keeps it from being zero
    everything = true_loss(asked, list(range(len(asked.groups_NS))))
    assert removal.losses[-1] == pytest.approx(everything, rel=1e-6)
    assert everything < 0.99 * energy


def test_one_order_serves_every_number_of_groups_that_stay() -> None:
    asked = problem(tokens(), weights())
    longest = obs.greedy([asked], N - 1)
    for count in range(1, N):
        kept = longest.kept(N, count)
        assert kept.tolist() == sorted(set(range(N)) - set(longest.order[: N - count]))
        assert torch.equal(kept, obs.greedy([asked], N - count).kept(N, count))


def test_the_update_is_least_squares_on_what_is_kept() -> None:
    x_TI, weight_OI = tokens(), weights()
    kept = torch.tensor([n for n in range(N * S) if n not in (3, 4, 5)])
    best_KO = torch.linalg.lstsq(x_TI[:, kept], x_TI @ weight_OI.T).solution
    solved_OK = obs.refit(weight_OI, x_TI.T @ x_TI, kept)
    # Normal equations square the condition of the tokens.
    torch.testing.assert_close(solved_OK, best_KO.T, rtol=1e-9, atol=1e-9)


def test_a_silent_group_leaves_first_and_costs_nothing() -> None:
    x_TI, weight_OI = tokens(), weights()
    x_TI[:, 6:9] = 0
    weight_OI[:, 6:9] = 1e6  # what it would say does not matter, for it never speaks
    silent_I = (x_TI == 0).all(0)
    removal = obs.greedy([problem(x_TI, weight_OI, damping=1e-4, silent_I=silent_I)], 1)
    assert removal.order == (2,)
    assert removal.losses == (0.0,)


def test_a_hessian_that_is_singular_but_for_rounding_still_gives_an_order() -> None:
    """An eigenvalue just below zero: no Cholesky factor exists, an inverse does."""
    hessian_II = torch.diag(torch.tensor([-1e-15, 2.0, 3.0, 4.0], dtype=torch.float64))
    weight_OI = torch.ones(1, 4, dtype=torch.float64)
    removal = obs.greedy([obs.Problem(weight_OI, hessian_II, torch.arange(4)[:, None])], 3)
    assert removal.order == (0, 1, 2)
    assert removal.losses == pytest.approx((0.0, 2.0, 5.0))


def test_damping_adds_a_share_of_the_mean_diagonal_and_never_leaves_a_zero() -> None:
    hessian_II = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    gap_II = obs.damped(hessian_II, 0.1) - hessian_II
    torch.testing.assert_close(gap_II, 0.3 * torch.eye(3, dtype=torch.float64))
    assert torch.isfinite(obs.damped(torch.zeros(3, 3).double(), 0.1).inverse()).all()
