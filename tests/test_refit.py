"""Least squares from moments, against the same solved from the tokens themselves."""

from __future__ import annotations

import math

import pytest
import torch

from dotexport.refit import Moments, compensate, fit, gain_solve, ridge_solve

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
    torch.testing.assert_close(parts.inputs_II, moments().inputs_II)
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
    lam = ridge * float(moments().inputs_II.diagonal().mean())
    extra_II = math.sqrt(lam) * torch.eye(6, dtype=torch.float64)
    rows = torch.cat([INPUTS_TI, extra_II]), torch.cat([TARGETS_TO, extra_II @ PRIOR_OI.T])
    reference_OI = torch.linalg.lstsq(*rows).solution.T
    torch.testing.assert_close(ridge_solve(moments(), PRIOR_OI, ridge), reference_OI)
    torch.testing.assert_close(ridge_solve(moments(), PRIOR_OI, 1e9), PRIOR_OI, atol=1e-6, rtol=0)


def test_singular_inputs_still_give_finite_weights() -> None:
    twice_TI = torch.cat([INPUTS_TI, INPUTS_TI], dim=1)
    solved_OI = ridge_solve(moments(twice_TI), torch.zeros(4, 12, dtype=torch.float64), 0.0)
    assert torch.isfinite(solved_OI).all()


def test_a_gain_is_the_best_diagonal_matrix_in_the_metric() -> None:
    inputs_TO = torch.randn(300, 4, dtype=torch.float64)
    targets_TO = inputs_TO * torch.tensor([1.5, 0.5, -1.0, 2.0]) + 0.1 * TARGETS_TO[:300]
    # |R (t - g z)|^2 written out as one tall least-squares problem in g.
    design = (ROOT_OO[None] * inputs_TO[:, None]).reshape(-1, 4)
    reference_O = torch.linalg.lstsq(design, (targets_TO @ ROOT_OO.T).reshape(-1, 1)).solution
    sums = moments(inputs_TO, targets_TO, METRIC_OO)
    solved_OO = gain_solve(sums, torch.eye(4, dtype=torch.float64), 0.0)
    torch.testing.assert_close(solved_OO.diagonal(), reference_O.flatten())
    assert (solved_OO - solved_OO.diagonal().diag()).abs().max() == 0


def test_a_fit_lowers_the_held_out_loss() -> None:
    train, held = (
        moments(INPUTS_TI[:300], TARGETS_TO[:300]),
        moments(INPUTS_TI[300:], TARGETS_TO[300:]),
    )
    fitted = fit(train, held, PRIOR_OI)
    assert fitted.error < fitted.analytic_error
    assert held.loss(fitted.weights_OI) < held.loss(PRIOR_OI)


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
