"""Allocation: one budget shared between the axes by what cuts were measured to cost.

Each axis is cut alone, about half as far as it would have to go to meet the budget by itself, and
the divergence from the original is measured on held-out windows. Costs of axes add up to first
order, which ranks the legal sizes within the budget; the best few are then measured together,
because cuts do interact, and the best of these is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from dotexport.axes import AXES, axes_of
from dotexport.axes.axis import Axis
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.errors import SizeError
from dotexport.models.shapes import Sizes
from dotexport.sizes.budget import filled, is_legal, num_rungs, preference, within_budget

LOOKED_AT = 64  # plans predicted best, of which those that are apart are measured
APART = 3  # of these are measured together
CHECKED = APART + 3  # with the rule's plan, and the best of one axis alone and of another
CLOSE = 1.5  # times what the better of two single axes is predicted to cost, and so the best may be

Measure = Callable[[Plan], float]
Course = Callable[[Plan], Mapping[int, float]]
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
        from scipy.interpolate import PchipInterpolator

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
    *,
    courses: Mapping[str, Course] | None = None,
    accept: Callable[[Plan], bool] = lambda plan: True,
    closer: Measure | None = None,
    healed: Measure | None = None,
) -> Allocation:
    """Choose sizes within a budget.

    Args:
        asked: has a budget; axes with an explicit size are not searched.
        measure: held-out divergence of a plan from the original.
        courses: by axis, how divergence rises with its cut, where that is known up to a factor:
            from a plan that cuts it alone to a value for every size on the way there.
        accept: what else the plan must satisfy.
        closer: the same divergence with more text, for the last few plans; None: `measure`.
        healed: the same behind a short distillation, by which these are judged then.

    Raises:
        SizeError: no sizes meet the budget, or none of those are accepted.
        UsageError: as `dotexport.sizes.budget.plan`.
    """
    plans = accepted(config, asked, accept)
    if not plans:
        raise SizeError(
            "no sizes within the budget are such that every target takes them; ask for another "
            "budget or fewer targets (dotexport plan MODEL --target NAME says what is in the way)"
        )
    before = plans[0].before
    axes = axes_of(before)
    points = {axis.name: found for axis in axes if (found := alone(axis, plans))}
    curves = {axis.name: Curve(axis.name, (axis.size(before),), (0.0,), (0,)) for axis in axes}
    for number, (name, plan) in enumerate(points.items()):
        size = _axis(name).size(plan.after)
        progress(f"measuring cuts: {name} {size}", number, len(points) + CHECKED)
        curves[name] = _curve(_axis(name), plan, measure(plan), (courses or {}).get(name))
    # No cut of these could be measured.
    flat = [axis for axis in axes if len(curves[axis.name].sizes) == 1]
    plans = [p for p in plans if all(_same(p, axis) for axis in flat)] or plans

    costs = cache(lambda name, size: curves[name].at(size))

    def expected(p: Plan) -> float:
        return sum(costs(axis.name, axis.size(p.after)) for axis in axes)

    plans.sort(key=lambda p: (expected(p), -p.parameters_after))
    rule = min(plans, key=preference)
    single: dict[str, Plan] = {}  # the best of each axis, the best of all first
    for p in plans:
        cut = [axis.name for axis in axes if not _same(p, axis)]
        if len(cut) == 1:
            single.setdefault(cut[0], p)
    least = min(map(expected, single.values()), default=0.0)
    close = [p for p in single.values() if expected(p) <= CLOSE * least]
    widest = partial(filled, config, asked, accept=accept)
    likely = (*_apart(map(widest, plans[:LOOKED_AT])), *map(widest, (*close, rule)))
    finalists = list({p.after: p for p in likely}.values())
    checked = []
    for number, plan in enumerate(finalists):
        progress("checking sizes", len(points) + number, len(points) + len(finalists))
        cost = (closer or measure)(plan)
        checked.append((plan, cost, healed(plan) if healed else cost))
    taken = min(checked, key=lambda found: found[2])[0]
    rows = tuple(
        _row(p, expected(p), found) | ({"healed_kl": behind} if healed else {})
        for p, found, behind in checked
    )
    return Allocation(taken, tuple(c for c in curves.values() if len(c.sizes) > 1), rows)


def _same(plan: Plan, axis: Axis) -> bool:
    return axis.size(plan.after) == axis.size(plan.before)


def accepted(
    config: Mapping[str, Any], asked: SizeOptions, accept: Callable[[Plan], bool]
) -> list[Plan]:
    """All accepted plans within the budget on the coarsest grid that has any, in whichever class
    can carry them.

    Raises:
        SizeError, UsageError: as `within_budget`.
    """
    rungs = range(num_rungs(config, asked))
    grids = (within_budget(config, asked, rung=rung, carried=True) for rung in rungs)
    return next(filter(None, (list(filter(accept, plans)) for plans in grids)), [])


def rehearsals(decided: Plan, plans: Sequence[Plan]) -> tuple[list[Plan], list[Plan]]:
    """Plans such as `allocate` will measure, where the rule has decided for one of these: cuts of
    one axis, and the last few."""
    axes = axes_of(decided.before)
    cuts = [found.on_kept_tokens for axis in axes if (found := alone(axis, plans))]
    return cuts, [decided.on_kept_tokens] * CHECKED


def alone(axis: Axis, plans: Sequence[Plan]) -> Plan | None:
    """This axis cut alone, about half as far as the budget asks where nothing else is cut; None: no
    plan cuts it.

    What a budget leaves to one axis of several is rarely more, and a curve is best known there.
    """
    like = plans[0]
    before, family = like.before, like.family
    same = {name: getattr(like.after, name) for name in ("tied", "biases", "vocab_size")}
    uncut = replace(before, **same)
    whole = axis.size(before)
    cuts = {size: axis.resized(uncut, size) for size in {axis.size(p.after) for p in plans}}
    legal = [size for size, sizes in cuts.items() if is_legal(family, before, sizes)]
    if not (sizes := sorted(set(legal) - {whole})):
        return None
    meeting = {p.after for p in plans}
    enough = [size for size in sizes if cuts[size] in meeting]
    half = (whole + max(enough, default=sizes[0])) / 2
    size = min(sizes, key=lambda size: abs(size - half))
    return replace(like, after=cuts[size])


def _curve(axis: Axis, plan: Plan, divergence: float, course: Course | None) -> Curve:
    """Through what was measured; between it and the original as the course says."""
    size, whole = axis.size(plan.after), axis.size(plan.before)
    way = dict(course(plan)) if course else {size: 1.0}
    scale = divergence / way[size] if way[size] > 0 else 0.0
    sizes = sorted(way)
    counts = (replace(plan, after=axis.resized(plan.after, s)).parameters_after for s in sizes)
    return Curve(
        axis.name,
        (*sizes, whole),
        (*(scale * way[s] for s in sizes), 0.0),
        (*counts, plan.parameters_before),
    )


def _axis(name: str) -> Axis:
    return next(axis for axis in AXES if axis.name == name)


def _apart(plans: Iterable[Plan]) -> list[Plan]:
    """The first few that are not next door to one another."""
    taken: list[Plan] = []
    for plan in plans:
        if all(_distance(plan.after, other.after) > 0.05 for other in taken):
            taken.append(plan)
        if len(taken) == APART:
            break
    return taken


def _distance(one: Sizes, two: Sizes) -> float:
    return max(abs(math.log(axis.size(one) / axis.size(two))) for axis in axes_of(one))


def _row(plan: Plan, predicted: float, measured: float) -> dict[str, Any]:
    return plan.sizes() | {
        "parameters": plan.parameters_after,
        "predicted_kl": predicted,
        "held_out_kl": measured,
    }
