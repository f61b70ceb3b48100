"""Sums over pictures: a bias as one more column, groups that never speak, sparse sweeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dotexport.diffusion.moments import Moments
from dotexport.diffusion.sparse import Pattern, sweep
from dotexport.errors import UsageError
from dotexport.merging import obs
from dotexport.merging.obs import damped

N, S, OUT, T = 6, 3, 5, 400  # groups, columns of a group, outputs, tokens


def tokens(num_in: int = N * S) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    mixed_II = torch.randn(num_in, num_in, generator=rng, dtype=torch.float64)
    return torch.randn(T, num_in, generator=rng, dtype=torch.float64) @ mixed_II + 1


def weights(num_in: int = N * S) -> Tensor:
    return torch.randn(OUT, num_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moments_of(x_TI: Tensor) -> Moments:
    found = Moments.zeros(x_TI.shape[1])
    found.add(x_TI)
    return found


def problem(x_TI: Tensor, weight_OI: Tensor, size: int = S, damping: float = 1e-8) -> obs.Problem:
    groups_NS = torch.arange(x_TI.shape[1]).view(-1, size)
    return moments_of(x_TI).problem(weight_OI, groups_NS, damping=damping, centred=False)


def test_a_bias_is_one_more_column_whose_feature_is_one() -> None:
    x_TI, weight_OI = tokens(), weights()
    kept = torch.arange(3, N * S)
    ones_TI = torch.cat([x_TI[:, kept], torch.ones(T, 1, dtype=torch.float64)], 1)
    best_KO = torch.linalg.lstsq(ones_TI, x_TI @ weight_OI.T).solution
    moments = moments_of(x_TI)
    solved_OK = obs.refit(weight_OI, moments.hessian(centred=True), kept)
    full_OI = torch.zeros_like(weight_OI)
    full_OI[:, kept] = solved_OK
    bias_O = (weight_OI - full_OI) @ moments.mean
    torch.testing.assert_close(torch.cat([solved_OK, bias_O[:, None]], 1), best_KO.T)


def test_a_silent_group_leaves_first_and_costs_nothing() -> None:
    x_TI, weight_OI = tokens(), weights()
    x_TI[:, 6:9] = 0
    weight_OI[:, 6:9] = 1e6  # what it would say does not matter, for it never speaks
    removal = obs.greedy([problem(x_TI, weight_OI, damping=1e-4)], 1)
    assert removal.order == (2,)
    assert removal.losses == (0.0,)


def test_of_two_copies_one_leaves_without_loss_and_then_not_the_other() -> None:
    x_TI, weight_OI = tokens(), weights()
    x_TI[:, 9:12] = x_TI[:, 0:3]
    asked = problem(x_TI, weight_OI)
    removal = obs.greedy([asked], 2)
    assert removal.order[0] in (0, 3)
    energy = obs.loss(weight_OI, 0 * weight_OI, asked.hessian_II)
    assert removal.losses[0] < 1e-7 * energy  # the damping keeps it from being zero
    assert removal.order[1] not in (0, 3)


def test_answers_of_their_own_make_weights_that_say_them() -> None:
    x_TI, weight_OI = tokens(), weights()
    aim_OI = weights().flip(0)
    moments = Moments.zeros(N * S, OUT)
    moments.add(x_TI, x_TI @ aim_OI.T)
    found_OI = moments.best_weights(weight_OI, damping=1e-12, centred=False)
    torch.testing.assert_close(found_OI, aim_OI, rtol=1e-6, atol=1e-6)


def test_damping_draws_toward_the_old_weights_and_not_toward_zero() -> None:
    """As tokens more, one for each input, to which the old weights give the answer."""
    x_TI, weight_OI, damping = tokens(), weights(), 0.5
    moments = Moments.zeros(N * S, OUT)
    moments.add(x_TI, y_TO := x_TI @ weights().flip(0).T)
    share = damping * float(moments.hessian(centred=False).diagonal().mean())
    more_II = (share * T) ** 0.5 * torch.eye(N * S, dtype=torch.float64)
    rows = torch.cat([x_TI, more_II]), torch.cat([y_TO, more_II @ weight_OI.T])
    found_OI = moments.best_weights(weight_OI, damping=damping, centred=False)
    torch.testing.assert_close(found_OI, torch.linalg.lstsq(*rows).solution.T)


def test_weights_of_tokens_count_like_repeated_tokens() -> None:
    x_TI = tokens()
    weighed, repeated = Moments.zeros(N * S), Moments.zeros(N * S)
    weighed.add(x_TI[:9], weight=2.0)
    weighed.add(x_TI[9:])
    repeated.add(torch.cat([x_TI[:9], x_TI]))
    torch.testing.assert_close(weighed.hessian(centred=True), repeated.hessian(centred=True))
    halves = moments_of(x_TI[:100]) + moments_of(x_TI[100:])
    torch.testing.assert_close(halves.inputs_II, moments_of(x_TI).inputs_II)


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_a_sweep_leaves_the_zeros_asked_for_and_beats_magnitude(text: str) -> None:
    x_TI, weight_OI, pattern = tokens(160), weights(160), Pattern.parse(text)
    hessian_II = damped(moments_of(x_TI).hessian(centred=False), 1e-2)
    swept_OI = sweep(weight_OI, hessian_II, pattern)
    gone_OI = swept_OI == 0
    assert int(gone_OI.sum()) == round(pattern.share * weight_OI.numel())
    if pattern.of:
        per_OG = gone_OI.view(OUT, -1, pattern.of).sum(-1)
        assert bool((per_OG == pattern.zeros).all())
    # With uncorrelated inputs the sweep is magnitude pruning.
    plain_OI = sweep(weight_OI, torch.eye(160, dtype=torch.float64), pattern)
    torch.testing.assert_close(plain_OI, weight_OI.where(plain_OI != 0, 0.0))
    assert obs.loss(weight_OI, swept_OI, hessian_II) < obs.loss(weight_OI, plain_OI, hessian_II)


def test_no_zeros_change_nothing() -> None:
    hessian_II = damped(moments_of(tokens()).hessian(centred=False), 1e-2)
    assert torch.equal(sweep(weights(), hessian_II, Pattern.parse("0")), weights())


@pytest.mark.parametrize("text", ["4:4", "3", "2:5", "half", "1.5"])
def test_other_sparsities_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="2:4"):
        Pattern.parse(text)
