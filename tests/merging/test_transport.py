"""Costs, plans and couplings against their definitions and slower references."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dotexport.errors import UsageError
from dotexport.merging.ot.cost import activation_distance
from dotexport.merging.ot.coupling import couple, nearest_targets
from dotexport.merging.transport_options import TransportOptions

RNG = np.random.default_rng(0)
ACTIVATIONS_TN = RNG.normal(size=(50, 9))
GRAM_NN = ACTIVATIONS_TN.T @ ACTIVATIONS_TN
KEPT_K = np.array([1, 4, 7])


def test_the_cost_is_the_distance_of_unit_activation_vectors_with_the_nearer_sign() -> None:
    unit_TN = ACTIVATIONS_TN / np.linalg.norm(ACTIVATIONS_TN, axis=0)
    signs = np.array([1.0, -1.0])
    gap_STNK = unit_TN[None, :, :, None] - signs[:, None, None, None] * unit_TN[:, None, KEPT_K]
    distance_SNK = np.linalg.norm(gap_STNK, axis=1)
    distance_NK, nearer_NK = distance_SNK.min(0), signs[distance_SNK.argmin(0)]
    cost_NK, sign_NK = activation_distance(GRAM_NN, KEPT_K)
    # sqrt(2 - 2 cos) loses half the digits of cos at distance 0: sqrt(2e-16) is about 1e-8.
    np.testing.assert_allclose(cost_NK, distance_NK / distance_NK.max(), atol=1e-7)
    assert (sign_NK == nearer_NK).all()
    assert {-1.0, 1.0} == set(sign_NK.flat)


def test_a_dead_neuron_costs_the_same_everywhere_and_is_no_nan() -> None:
    gram_NN = GRAM_NN.copy()
    gram_NN[0] = gram_NN[:, 0] = 0.0
    cost_NK, _ = activation_distance(gram_NN, KEPT_K)
    assert np.isfinite(cost_NK).all()
    assert np.ptp(cost_NK[0]) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("plan", ["semi-relaxed", "balanced"])
def test_a_plan_has_the_marginals_that_were_asked_for(plan: str, epsilon: float) -> None:
    cost = activation_distance(GRAM_NN, KEPT_K)
    mass_N = RNG.uniform(0.1, 1, size=9)
    coupling = couple(cost, mass_N, TransportOptions(plan=plan, epsilon=epsilon, max_steps=20000))
    assert coupling.plan_NK.min() >= 0
    # Sinkhorn stops at 1e-9 by default; the others are exact.
    assert coupling.marginal_error < 1e-7
    assert 1 - 1e-9 <= coupling.sources_per_target <= 9


def test_the_semi_relaxed_closed_form_minimises_its_objective() -> None:
    """No random plan with the same source marginal is better."""
    cost = activation_distance(GRAM_NN, KEPT_K)
    mass_N = np.full(9, 1 / 9)
    epsilon = 0.1
    best_NK = couple(cost, mass_N, TransportOptions(epsilon=epsilon)).plan_NK

    def objective(plan_NK: np.ndarray) -> float:
        entropy = -(plan_NK * np.log(plan_NK)).sum()
        return float((plan_NK * cost.cost_NK).sum() - epsilon * entropy)

    for _ in range(200):
        other_NK = best_NK * np.exp(0.1 * RNG.normal(size=best_NK.shape))
        other_NK *= (mass_N / other_NK.sum(1))[:, None]
        assert objective(best_NK) <= objective(other_NK)


def test_without_entropy_each_source_goes_to_its_nearest_target() -> None:
    cost_NK = RNG.uniform(size=(9, 3))
    exact_NK = nearest_targets(cost_NK, epsilon=0)
    assert (exact_NK.argmax(1) == cost_NK.argmin(1)).all()
    # The entropic plan tends to the exact one.
    np.testing.assert_allclose(nearest_targets(cost_NK, epsilon=1e-4), exact_NK, atol=1e-6)


def test_the_exact_balanced_plan_of_equal_sizes_is_the_best_assignment() -> None:
    cost = activation_distance(GRAM_NN, np.arange(9))
    shuffled = cost._replace(cost_NK=RNG.uniform(size=(9, 9)))
    rows, columns = linear_sum_assignment(shuffled.cost_NK)
    coupling = couple(shuffled, np.ones(9), TransportOptions(plan="balanced", epsilon=0))
    assert coupling.cost == pytest.approx(shuffled.cost_NK[rows, columns].sum() / 9, abs=1e-12)


def test_balanced_plans_force_foreign_mass_into_a_unique_target_and_semi_relaxed_ones_do_not() -> (
    None
):
    """One lonely kept neuron; all others are copies of the second kept one."""
    activations_TN = np.repeat(RNG.normal(size=(50, 1)), 9, axis=1)
    activations_TN[:, 0] = RNG.normal(size=50)
    gram_NN = activations_TN.T @ activations_TN
    cost = activation_distance(gram_NN, np.array([0, 1]))
    balanced = couple(cost, np.ones(9), TransportOptions(plan="balanced", epsilon=0))
    relaxed = couple(cost, np.ones(9), TransportOptions(epsilon=0))
    assert balanced.plan_NK[1:, 0].sum() == pytest.approx(1 / 2 - 1 / 9)
    assert relaxed.plan_NK[1:, 0].sum() == 0


def test_columns_of_a_merge_map_are_signed_weights_that_sum_to_one_in_magnitude() -> None:
    cost = activation_distance(GRAM_NN, KEPT_K)
    merge_NK = couple(cost, np.ones(9), TransportOptions()).merge_map()
    np.testing.assert_allclose(np.abs(merge_NK).sum(0), 1.0, rtol=1e-12)
    assert (np.sign(merge_NK) == cost.sign_NK).all()


@pytest.mark.parametrize("wrong", [{"plan": "free"}, {"epsilon": -1.0}])
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        TransportOptions(**wrong)  # type: ignore[arg-type]
