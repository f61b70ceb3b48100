"""Sharing a budget between the axes by measured curves."""

from __future__ import annotations

from typing import Any

import pytest

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.errors import SizeError, UsageError
from dotexport.models.text_options import TextOptions
from dotexport.sizes.allocation import Curve, allocate
from dotexport.sizes.budget import plan, within_budget

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
}
ASKED = SizeOptions(params="0.7x")


def shares(plan: Plan) -> tuple[float, float, float, float]:
    before, after = plan.before, plan.after
    return (
        1 - after.hidden_size / before.hidden_size,
        1 - after.intermediate_size / before.intermediate_size,
        1 - after.num_key_value_heads / before.num_key_value_heads,
        1 - after.num_layers / before.num_layers,
    )


@pytest.mark.parametrize(
    "weights",
    [(9.0, 1.0, 5.0, 3.0), (1.0, 9.0, 5.0, 8.0), (4.0, 1.0, 0.1, 2.0), (9.0, 9.0, 9.0, 1.0)],
)
def test_the_best_plan_of_all_is_found_where_costs_add_up(weights: tuple[float, ...]) -> None:
    def cost(plan: Plan) -> float:
        return sum(w * s**2 for w, s in zip(weights, shares(plan), strict=True))

    found = allocate(CONFIG, ASKED, cost)
    best = min(cost(plan) for plan in within_budget(CONFIG, ASKED))
    assert cost(found.plan) <= best * (1 + 1e-9)  # less where it is filled off the grid
    assert found.plan.ratio <= 0.7
    for row in found.checked:
        assert row["predicted_kl"] == pytest.approx(row["held_out_kl"], abs=1e-3)


def test_what_is_measured_together_decides_over_what_was_predicted() -> None:
    """Cutting both widths is worse than their sum says; a plan that spares one is taken."""

    def cost(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return (
            4 * hidden**2
            + mlp**2
            + 5 * heads**2
            + 6 * depth**2
            + (10.0 if hidden and mlp > 0.2 else 0.0)
        )

    found = allocate(CONFIG, ASKED, cost)
    measured = [row["held_out_kl"] for row in found.checked]
    assert cost(found.plan) == min(measured)
    assert any(row["held_out_kl"] > row["predicted_kl"] + 1 for row in found.checked)


def test_what_was_predicted_best_is_not_taken_where_it_measures_worse() -> None:
    """Its cuts cost alone what they did, and one nat more together."""

    def apart(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return 4 * hidden**2 + mlp**2 + 5 * heads**2 + 6 * depth**2

    first = allocate(CONFIG, ASKED, apart).checked[0]

    def together(plan: Plan) -> float:
        return apart(plan) + (plan.sizes().items() <= first.items())

    found = allocate(CONFIG, ASKED, together)
    assert found.checked[0]["predicted_kl"] == first["predicted_kl"]
    assert found.checked[0]["held_out_kl"] == first["held_out_kl"] + 1
    assert together(found.plan) == min(row["held_out_kl"] for row in found.checked)
    assert together(found.plan) < found.checked[0]["held_out_kl"]


def test_a_single_axis_is_taken_where_any_two_cuts_together_cost_more() -> None:
    """However good mixes are predicted to be: the best cut of one axis is measured beside them."""

    def cost(plan: Plan) -> float:
        cut = shares(plan)
        alone = sum(w * s**2 for w, s in zip((3.0, 1.0, 3.0, 2.0), cut, strict=True))
        return alone + 5.0 * (sum(map(bool, cut)) > 1)

    found = allocate(CONFIG, ASKED, cost)
    assert sum(map(bool, shares(found.plan))) == 1
    assert cost(found.plan) == min(row["held_out_kl"] for row in found.checked)


def test_of_single_axes_that_are_predicted_alike_each_is_measured() -> None:
    """The MLP alone seems the best of them; layers cost less than their curve says."""

    def cost(plan: Plan) -> float:
        cut = shares(plan)
        alone = sum(w * s**2 for w, s in zip((20.0, 1.0, 9.0, 2.4), cut, strict=True))
        meets = plan.after.num_layers <= 2  # and half as far, where curves are measured, does not
        return alone * (0.1 if meets else 1.0) + 5.0 * (sum(map(bool, cut)) > 1)

    asked = SizeOptions(params="0.75x")
    found = allocate(CONFIG, asked, cost, courses={"num_hidden_layers": _squares})
    assert [bool(cut) for cut in shares(found.plan)] == [False, False, False, True]
    singles = [row for row in found.checked if row["held_out_kl"] < 5]
    assert [row["num_hidden_layers"] for row in singles[:2]] == [4, 2]  # in the order predicted
    assert cost(found.plan) == min(row["held_out_kl"] for row in found.checked)


def _squares(plan: Plan) -> dict[int, float]:
    return {n: (1 - n / 4) ** 2 for n in range(plan.after.num_layers, 4)}


def test_with_more_text_another_plan_is_taken_where_that_makes_it_better() -> None:
    """Curves are measured on little, in which the MLP looks dearer than it is."""

    def little(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return 4 * hidden**2 + 6 * mlp**2 + 5 * heads**2 + 3 * depth**2

    def more(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return 4 * hidden**2 + 0.1 * mlp**2 + 5 * heads**2 + 3 * depth**2

    plain = allocate(CONFIG, ASKED, little)
    found = allocate(CONFIG, ASKED, little, closer=more)
    assert found.curves == plain.curves
    assert [row["held_out_kl"] for row in found.checked] == [
        pytest.approx(more(plan)) for plan in (_planned(row) for row in found.checked)
    ]
    assert more(found.plan) == min(row["held_out_kl"] for row in found.checked)
    assert more(found.plan) < more(plain.plan)


def _planned(row: dict[str, Any]) -> Plan:
    names = ("hidden_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers")
    return plan(CONFIG, SizeOptions(**{name: row[name] for name in names}))


def test_behind_a_distillation_another_plan_is_taken_where_that_heals_it_more() -> None:
    """Cuts in depth heal, cuts in width hardly do; curves are measured without."""

    def cost(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return 4 * hidden**2 + mlp**2 + 5 * heads**2 + 3 * depth**2

    def healed(plan: Plan) -> float:
        hidden, mlp, heads, depth = shares(plan)
        return hidden + mlp + heads + 0.01 * depth

    plain, found = allocate(CONFIG, ASKED, cost), allocate(CONFIG, ASKED, cost, healed=healed)
    assert [row["held_out_kl"] for row in found.checked] == [
        row["held_out_kl"] for row in plain.checked
    ]
    assert healed(found.plan) == min(row["healed_kl"] for row in found.checked)
    assert healed(found.plan) < healed(plain.plan)
    assert "healed_kl" not in plain.checked[0]


def test_an_axis_with_an_explicit_size_is_not_searched() -> None:
    asked = SizeOptions(params="0.7x", hidden_size=192, num_key_value_heads=4)
    found = allocate(CONFIG, asked, lambda plan: sum(shares(plan)))
    assert found.plan.after.hidden_size == 192
    assert found.plan.after.num_key_value_heads == 4


def test_a_budget_that_no_sizes_meet_is_refused_before_anything_is_measured() -> None:
    def never(plan: Plan) -> float:
        raise AssertionError("measured first")

    with pytest.raises(SizeError, match="ask for at least that"):
        allocate(CONFIG, SizeOptions(params="0.01x"), never)


def test_a_curve_runs_through_what_was_measured_and_falls_with_size() -> None:
    curve = Curve("hidden_size", (128, 192, 256), (0.4, 0.1, 0.0), (1, 2, 3))
    for size, divergence in zip(curve.sizes, curve.divergences, strict=True):
        assert curve.at(size) == pytest.approx(divergence, abs=1e-12)
    values = [curve.at(size) for size in range(96, 257, 16)]
    assert values == sorted(values, reverse=True)
    # Quadratic in the share cut: its root is straight, and lies exactly on the line here.
    assert curve.at(224) == pytest.approx(0.025, rel=0.05)


def test_unknown_ways_to_allocate_are_refused() -> None:
    with pytest.raises(UsageError, match="measured, rule"):
        ShrinkOptions(text=TextOptions(source="text.txt"), sizes=ASKED, allocate="guess")
