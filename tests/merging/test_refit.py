"""Least squares from moments, against the same solved from the tokens themselves."""

from __future__ import annotations

import math

import pytest
import torch

from dotexport.merging.refit import (
    RIDGES,
    Moments,
    compensate,
    fit,
    gain_solver,
    ridge_solve,
    symmetric_solve,
)

torch.manual_seed(0)
INPUTS_TI = torch.randn(400, 6, dtype=torch.float64)
TRUE_OI = torch.randn(4, 6, dtype=torch.float64)
TARGETS_TO = INPUTS_TI @ TRUE_OI.T + 0.1 * torch.randn(400, 4, dtype=torch.float64)
PRIOR_OI = TRUE_OI + 0.3 * torch.randn(4, 6, dtype=torch.float64)
ROOT_OO = torch.randn(4, 4, dtype=torch.float64)
METRIC_OO = ROOT_OO.T @ ROOT_OO


def moments(
    inputs_TI: torch.Tensor = INPUTS_TI,
    targets_TO: torch.Tensor = TARGETS_TO,
    metric_OO: torch.Tensor | None = None,
) -> Moments:
    sums = Moments.zeros(inputs_TI.shape[1], targets_TO.shape[1], metric_OO=metric_OO)
    sums.add(inputs_TI, targets_TO)
    return sums


def test_moments_of_two_halves_add_up_to_those_of_the_whole() -> None:
    parts = moments(INPUTS_TI[:150], TARGETS_TO[:150]) + moments(INPUTS_TI[150:], TARGETS_TO[150:])
    torch.testing.assert_close(parts.inputs.full(), moments().inputs.full())
    torch.testing.assert_close(parts.cross_OI, moments().cross_OI)
    assert parts.count == 400


@pytest.mark.parametrize("metric_OO", [None, METRIC_OO])
def test_the_loss_from_moments_is_the_mean_square_over_tokens(
    metric_OO: torch.Tensor | None,
) -> None:
    error_TO = TARGETS_TO - INPUTS_TI @ PRIOR_OI.T
    weighed_TO = error_TO if metric_OO is None else error_TO @ metric_OO
    expected = float((weighed_TO * error_TO).sum(1).mean())
    assert moments(metric_OO=metric_OO).loss(PRIOR_OI) == pytest.approx(expected, rel=1e-10)
    energy = moments(metric_OO=metric_OO).loss(torch.zeros_like(PRIOR_OI))
    assert energy == pytest.approx(moments(metric_OO=metric_OO).energy, rel=1e-12)


def test_without_ridge_the_solution_is_that_of_least_squares() -> None:
    reference_OI = torch.linalg.lstsq(INPUTS_TI, TARGETS_TO).solution.T
    torch.testing.assert_close(ridge_solve(moments(), PRIOR_OI, 0.0), reference_OI)


def test_the_ridge_pulls_toward_the_prior_and_not_toward_zero() -> None:
    """As extra tokens whose target is what the prior says: the textbook form of a ridge."""
    ridge = 0.5
    lam = ridge * float(moments().inputs.full().diagonal().mean())
    extra_II = math.sqrt(lam) * torch.eye(6, dtype=torch.float64)
    rows = torch.cat([INPUTS_TI, extra_II]), torch.cat([TARGETS_TO, extra_II @ PRIOR_OI.T])
    reference_OI = torch.linalg.lstsq(*rows).solution.T
    torch.testing.assert_close(ridge_solve(moments(), PRIOR_OI, ridge), reference_OI)
    torch.testing.assert_close(ridge_solve(moments(), PRIOR_OI, 1e9), PRIOR_OI, atol=1e-6, rtol=0)


def test_singular_inputs_still_give_finite_weights() -> None:
    twice_TI = torch.cat([INPUTS_TI, INPUTS_TI], dim=1)
    solved_OI = ridge_solve(moments(twice_TI), torch.zeros(4, 12, dtype=torch.float64), 0.0)
    assert torch.isfinite(solved_OI).all()


def test_a_gain_is_the_best_scaling_of_the_columns_of_a_map_in_the_metric() -> None:
    map_OI = torch.randn(4, 3, dtype=torch.float64)
    inputs_TI = torch.randn(300, 3, dtype=torch.float64)
    targets_TO = inputs_TI @ (map_OI * torch.tensor([1.5, 0.5, -1.0])).T + 0.1 * TARGETS_TO[:300]
    # |R (t - map (g o z))|^2 written out as one tall least-squares problem in g.
    design = ((ROOT_OO @ map_OI)[None] * inputs_TI[:, None]).reshape(-1, 3)
    reference_I = torch.linalg.lstsq(design, (targets_TO @ ROOT_OO.T).reshape(-1, 1)).solution
    sums = moments(inputs_TI, targets_TO, METRIC_OO)
    solved_OI = gain_solver(sums, map_OI, map_OI=map_OI)(0.0)
    torch.testing.assert_close(solved_OI, map_OI * reference_I.flatten())
    strong_OI = gain_solver(sums, 2 * map_OI, map_OI=map_OI)(1e9)
    torch.testing.assert_close(strong_OI, 2 * map_OI, atol=1e-6, rtol=0)


def test_the_symmetric_solution_is_the_best_symmetric_matrix() -> None:
    """Against least squares over the free entries of a symmetric matrix."""
    root_KK, wanted_KK = torch.randn(2, 3, 3, dtype=torch.float64)
    x_TK = torch.randn(50, 3, dtype=torch.float64)
    target_TK = x_TK @ wanted_KK.T
    places = [(i, j) for i in range(3) for j in range(i + 1)]
    units = torch.zeros(len(places), 3, 3, dtype=torch.float64)
    for unit_KK, (i, j) in zip(units, places, strict=True):
        unit_KK[i, j] = unit_KK[j, i] = 1.0
    design = torch.stack([(x_TK @ u_KK.T @ root_KK.T).flatten() for u_KK in units], dim=1)
    free = torch.linalg.lstsq(design, (target_TK @ root_KK.T).reshape(-1, 1)).solution
    reference_KK = (free[:, :, None] * units).sum(0)
    left_KK, right_KK = root_KK.T @ root_KK, x_TK.T @ x_TK
    solved_KK = symmetric_solve(left_KK, right_KK, left_KK @ wanted_KK @ right_KK)
    torch.testing.assert_close(solved_KK, reference_KK)


def test_sums_given_a_last_input_of_ones_are_covariances() -> None:
    shifted_TI, shifted_TO = INPUTS_TI + 3.0, TARGETS_TO - 2.0
    ones_TI = torch.column_stack([shifted_TI, torch.ones(len(shifted_TI))])
    given = moments(ones_TI, shifted_TO).given_last()
    centred_TI, centred_TO = shifted_TI - shifted_TI.mean(0), shifted_TO - shifted_TO.mean(0)
    expected = moments(centred_TI, centred_TO)
    torch.testing.assert_close(given.inputs.full(), expected.inputs.full())
    torch.testing.assert_close(given.cross_OI, expected.cross_OI)
    assert given.targets == pytest.approx(expected.targets)


def test_a_fit_lowers_the_held_out_loss() -> None:
    train, held = (
        moments(INPUTS_TI[:300], TARGETS_TO[:300]),
        moments(INPUTS_TI[300:], TARGETS_TO[300:]),
    )
    fitted = fit(train, held, PRIOR_OI)
    assert fitted.error < fitted.analytic_error
    assert held.loss(fitted.weights_OI) < held.loss(PRIOR_OI)


def test_a_ridge_is_chosen_by_tokens_that_it_was_not_fitted_on() -> None:
    """Twelve noisy tokens, and ten of the truth: fitted on these too, no ridge would be needed."""
    rng = torch.Generator().manual_seed(0)
    noise_TO = torch.randn(12, 4, generator=rng, dtype=torch.float64)
    noisy_TO = INPUTS_TI[:12] @ TRUE_OI.T + noise_TO
    train = moments(INPUTS_TI[:12], noisy_TO)
    held = moments(INPUTS_TI[12:22], INPUTS_TI[12:22] @ TRUE_OI.T)
    fitted = fit(train, held, PRIOR_OI)
    losses = {ridge: held.loss(ridge_solve(train, PRIOR_OI, ridge)) for ridge in RIDGES}
    assert fitted.ridge == min(losses, key=losses.__getitem__)
    assert fitted.error == pytest.approx(losses[fitted.ridge] / held.energy)
    # Nor are they fitted on afterwards: what is measured on them stays true of other text.
    alone_OI = ridge_solve(train, PRIOR_OI, fitted.ridge)
    torch.testing.assert_close(fitted.weights_OI, alone_OI, rtol=0, atol=0)


def test_a_fit_that_would_not_help_held_out_tokens_is_not_made() -> None:
    """Ten noisy tokens against a prior that is the truth."""
    noisy_TO = INPUTS_TI[:10] @ TRUE_OI.T + torch.randn(10, 4, dtype=torch.float64)
    clean_TO = INPUTS_TI[10:] @ TRUE_OI.T
    fitted = fit(moments(INPUTS_TI[:10], noisy_TO), moments(INPUTS_TI[10:], clean_TO), TRUE_OI)
    assert torch.equal(fitted.weights_OI, TRUE_OI)
    assert fitted.as_dict()["ridge"] is None


def test_compensation_is_least_squares_onto_what_all_inputs_said() -> None:
    kept = torch.tensor([0, 2, 3])
    mixed_TI = INPUTS_TI @ torch.randn(6, 6, dtype=torch.float64)
    said_TO = mixed_TI @ TRUE_OI.T
    reference_OK = torch.linalg.lstsq(mixed_TI[:, kept], said_TO).solution.T
    solved_OK = compensate(moments(mixed_TI), TRUE_OI, kept, damping=1e-12)
    torch.testing.assert_close(solved_OK, reference_OK, atol=1e-8, rtol=1e-8)
