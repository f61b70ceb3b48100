"""Allocation: one budget shared between the axes by what cuts were measured to cost.

Each axis is cut alone to a few sizes, and the divergence from the original is measured on held-out
windows. Costs of axes add up to first order, which ranks the legal sizes within the budget; the
best few are then measured together, because cuts do interact, and the best of these is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from dotexport.axes import AXES
from dotexport.axes.axis import Axis
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.models.shapes import Sizes
from dotexport.sizes.budget import filled, is_legal, preference, within_budget

POINTS = 2  # of each curve besides the original
LOOKED_AT = 64  # plans predicted best, of which those that are apart are measured
CHECKED = 3  # predicted best ones that are measured together, besides the rule's

Measure = Callable[[Plan], float]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Curve:
    """Divergence by size of one axis, all others as in the original.

    Attributes:
        sizes: ascending; the last is the original's, with divergence 0.
        divergences: held-out KL, nats per token.
        parameters: of the whole model at each size.
    """

    axis: str
    sizes: tuple[int, ...]
    divergences: tuple[float, ...]
    parameters: tuple[int, ...]

    def at(self, size: int) -> float:
        """Between the measured sizes, in the square root of the divergence: that is close to linear
        in the share cut, because the divergence starts as a quadratic."""
        if len(self.sizes) == 1:
            return 0.0
        roots = np.sqrt(np.maximum(self.divergences, 0.0))
        curve = PchipInterpolator(self.sizes, roots, extrapolate=True)
        return float(max(curve(size), 0.0) ** 2)

    def as_dict(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "sizes": list(self.sizes),
            "held_out_kl": list(self.divergences),
            "parameters": list(self.parameters),
        }


@dataclass(frozen=True)
class Allocation:
    """The sizes that were taken, and why.

    Attributes:
        curves: one per axis that could be cut.
        checked: plans that were measured whole: sizes, predicted and measured divergence.
    """

    plan: Plan
    curves: tuple[Curve, ...]
    checked: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        return {"curves": [curve.as_dict() for curve in self.curves], "checked": list(self.checked)}


def allocate(
    config: Mapping[str, Any],
    asked: SizeOptions,
    measure: Measure,
    progress: Progress = lambda stage, done, total: None,
) -> Allocation:
    """Choose sizes within a budget.

    Args:
        asked: has a budget; axes with an explicit size are not searched.
        measure: held-out divergence of a plan from the original.

    Raises:
        SizeError, UsageError: as `dotexport.sizes.budget.plan`.
    """
    plans = within_budget(config, asked)
    before = plans[0].before
    points = [point for axis in AXES for point in _points(axis, plans, before)]
    measured: dict[tuple[str, int], float] = {}
    for number, (axis, size, plan) in enumerate(points):
        progress(f"measuring cuts: {axis} {size}", number, len(points) + CHECKED + 1)
        measured[axis, size] = measure(plan)
    curves = {axis.name: _curve(axis, points, measured, before) for axis in AXES}
    # No cut of these could be measured.
    flat = [axis for axis in AXES if len(curves[axis.name].sizes) == 1]
    plans = [p for p in plans if all(_same(p, axis) for axis in flat)] or plans

    costs = cache(lambda name, size: curves[name].at(size))

    def expected(p: Plan) -> float:
        return sum(costs(axis.name, axis.size(p.after)) for axis in AXES)

    plans.sort(key=lambda p: (expected(p), -p.parameters_after))
    rule = min(plans, key=preference)
    widest = partial(filled, config, asked)
    finalists = list(
        {p.after: p for p in (*_apart(map(widest, plans[:LOOKED_AT])), widest(rule))}.values()
    )
    checked = []
    for number, plan in enumerate(finalists):
        progress("checking sizes", len(points) + number, len(points) + len(finalists))
        checked.append((plan, measure(plan)))
    taken, _ = min(checked, key=lambda pair: pair[1])
    rows = tuple(_row(p, expected(p), found) for p, found in checked)
    return Allocation(taken, tuple(c for c in curves.values() if len(c.sizes) > 1), rows)


def _same(plan: Plan, axis: Axis) -> bool:
    return axis.size(plan.after) == axis.size(plan.before)


def _points(axis: Axis, plans: Iterable[Plan], before: Sizes) -> list[tuple[str, int, Plan]]:
    """A few sizes of this axis alone, from the largest cut that plans make to a small one."""
    plans = list(plans)
    whole = axis.size(before)
    sizes = sorted({axis.size(p.after) for p in plans} - {whole})
    # No plan worth the name empties one axis: 2.5 times the share that the budget takes is enough.
    share = 1 - max(p.ratio for p in plans)
    sizes = [s for s in sizes if s >= whole * max(1 - 2.5 * share, 0.2)] or sizes[-1:]
    like = plans[0]
    same = {name: getattr(like.after, name) for name in ("tied", "biases", "vocab_size")}
    uncut = replace(before, **same)
    alone = {s: replace(like, after=axis.resized(uncut, s)) for s in sizes}
    legal = [s for s in sizes if is_legal(like.family, before, alone[s].after)]
    spread = sorted({legal[round(n)] for n in np.linspace(0, len(legal) - 1, POINTS) if legal})
    return [(axis.name, size, alone[size]) for size in spread]


def _curve(
    axis: Axis,
    points: list[tuple[str, int, Plan]],
    measured: Mapping[tuple[str, int], float],
    before: Sizes,
) -> Curve:
    mine = [
        (size, measured[name, size], p.parameters_after)
        for name, size, p in points
        if name == axis.name
    ]
    parameters = points[0][2].parameters_before if points else 0
    sizes, divergences, counts = zip(*mine, (axis.size(before), 0.0, parameters), strict=True)
    return Curve(axis.name, sizes, divergences, counts)


def _apart(plans: Iterable[Plan]) -> list[Plan]:
    """The first few that are not next door to one another."""
    taken: list[Plan] = []
    for plan in plans:
        if all(_distance(plan.after, other.after) > 0.05 for other in taken):
            taken.append(plan)
        if len(taken) == CHECKED:
            break
    return taken


def _distance(one: Sizes, two: Sizes) -> float:
    return max(abs(math.log(axis.size(one) / axis.size(two))) for axis in AXES)


def _row(plan: Plan, predicted: float, measured: float) -> dict[str, Any]:
    return plan.sizes() | {
        "parameters": plan.parameters_after,
        "predicted_kl": predicted,
        "held_out_kl": measured,
    }
