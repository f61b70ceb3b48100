"""Axes that a budget may cut and that stay whole because a target or a class takes nothing smaller.

Said in a sentence each: who refuses, by which rule, and which class would be free of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dotexport.axes import axes_of
from dotexport.axes.axis import Axis
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.models.families import find_family
from dotexport.sizes import square

Problems = Callable[[Plan], Sequence[str]]


def frozen(
    config: Mapping[str, Any],
    asked: SizeOptions,
    decided: Plan,
    rules: Mapping[str, Problems],
) -> list[str]:
    """A sentence for each axis of which the sizes that were taken leave no smaller one.

    Args:
        rules: name -> what is wrong with a plan.
    """
    if not asked.budgeted:
        return []
    held = {*asked.sizes, *(square.COUPLED if asked.square else ())}
    every = axes_of(decided.before)
    axes = (axis for axis in every if axis.name not in held and asked.may_cut(axis))
    found = (_stays(config, asked, decided, rules, axis) for axis in axes)
    return [sentence for sentence in found if sentence is not None]


def _stays(
    config: Mapping[str, Any],
    asked: SizeOptions,
    decided: Plan,
    rules: Mapping[str, Problems],
    axis: Axis,
) -> str | None:
    whole = axis.size(decided.before)
    smaller = [size for size in axis.grids(decided.family, decided.before)[-1] if size < whole]
    if axis.size(decided.after) != whole or not smaller:
        return None
    said = f"{axis.name} stays {whole}"
    plans = [replace(decided, after=axis.resized(decided.after, size)) for size in smaller]
    legal = [p for p in plans if axis.problem(p.family, p.before, p.after) is None]
    if not legal:
        largest = plans[-1]
        why = axis.problem(largest.family, largest.before, largest.after)
        name = decided.family.architecture
        free = _free(config, asked, largest, lambda p: axis.problem(p.family, p.before, p.after))
        return f"{said}: {name} takes no smaller one ({smaller[-1]} {why}); {free}"
    if not all(any(problems(plan) for problems in rules.values()) for plan in reversed(legal)):
        return None
    largest = legal[-1]
    name, problems = next((n, problems) for n, problems in rules.items() if problems(largest))
    free = _free(config, asked, largest, problems)
    return f"{said}: {name} takes no smaller one ({'; '.join(problems(largest))}); {free}"


def _free(
    config: Mapping[str, Any],
    asked: SizeOptions,
    refused: Plan,
    problems: Callable[[Plan], Sequence[str] | str | None],
) -> str:
    """Which class that computes the same is free of a rule, and what keeps this model out of it."""
    carried = replace(refused, family=find_family(config))
    plain = replace(
        carried,
        before=replace(refused.before, windowed=False),
        after=replace(refused.after, windowed=False),
    )
    kept = "--keep-class keeps it out" if asked.keep_class else "a budget of time keeps the class"
    for plan, why in ((carried, kept), (plain, "it attends to no sliding window")):
        if plan.carrier is not refused.carrier and not problems(plan):
            return f"{plan.carrier.architecture} computes the same and would take it, but {why}"
    return "no class that computes the same is free of that"
