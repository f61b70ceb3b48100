"""Which sizes: the legal ones, and how a budget is shared between the axes.

Reads config.json only; no weights, no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from dotexport.axes import AXES, axes_of
from dotexport.axes.axis import LEAST_SHARE, Axis
from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import SizeError, UsageError
from dotexport.models.families import find_carrier
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes
from dotexport.sizes import square

TRIED = 16  # plans, the best first, that are filled where the first falls short
CLOSE = 0.99  # of a budget: what falls short of it by more is widened, or said
NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][0-9]+)?"


def plan(config: Mapping[str, Any], asked: SizeOptions) -> Plan:
    """Decide the sizes: those asked for, or the best legal ones within a budget.

    Raises:
        SizeError: a size no consumer could load, or a budget no legal sizes meet.
        UsageError: nothing was asked for.
        UnsupportedModelError: no family table, or weights that are quantised already.
    """
    family, before = read_asked(config, asked)
    if not asked.explicit and not asked.budgeted and asked.vocab_size is None:
        flags = [f"--{axis.flag.replace('_', '-')} N" for axis in axes_of(before)]
        raise UsageError(
            "say how narrow: --params 0.7x (or --size, --latency), or "
            f"{', '.join(flags[:-1])} and/or {flags[-1]}; or which tokens stay: --vocab N"
        )
    asked = check_sizes(family, before, asked)
    if not asked.budgeted:
        return Plan(family, before, asked.finished(family, resized(before, asked.sizes)))
    return closest(config, asked, sorted(within_budget(config, asked), key=preference))


def read_asked(config: Mapping[str, Any], asked: SizeOptions) -> tuple[Family, Sizes]:
    """Family table and sizes; the table without carriers where the original's class is to stay.

    Raises:
        UsageError, UnsupportedModelError: as `dotexport.axes.plan.read_model`.
    """
    family, before = read_model(config, keep_class=asked.keep_class)
    # Layers are timed in the class that they have.
    timed = asked.latency is not None and family.architecture in family.carriers
    return (family.uncarried() if timed else family), before


def _leaves_its_class(family: Family, sizes: Sizes) -> bool:
    """Whether a model that is written as itself where it can be is not at these sizes."""
    return family.architecture in family.carriers and find_carrier(family, sizes) is not family


def strain(decided: Plan) -> float:
    """How much a cut is expected to cost; smaller is better. A rule for when nothing is measured.

    Each axis adds a quadratic in the share cut from it, so the rule shares a budget between the
    axes instead of emptying one.
    """
    return sum(axis.strain(decided.before, decided.after) for axis in axes_of(decided.before))


def preference(decided: Plan) -> tuple[float, int]:
    """What plans are sorted by, the best first."""
    return strain(decided), -decided.parameters_after


def check_sizes(family: Family, before: Sizes, asked: SizeOptions) -> SizeOptions:
    """Refuse explicit sizes that the class or the kernels cannot hold.

    Returns:
        What was asked for; of a square pair, what the sizes that were given leave no choice of.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    free = [axis for axis in AXES if not axis.depends and axis.name in asked.sizes]
    _check(family, before, asked, free)
    if asked.square:
        asked = replace(asked, sizes=square.settled(before, asked.sizes, free=asked.budgeted))
    _check(family, before, asked, [axis for axis in AXES if _is_bound(axis, asked)])
    return asked


def _is_bound(axis: Axis, asked: SizeOptions) -> bool:
    """Whether this size, which depends on others, is decided by what was asked for."""
    moved = any(name in asked.sizes for name in axis.depends) and not asked.budgeted
    return bool(axis.depends) and (axis.name in asked.sizes or moved)


def _check(family: Family, before: Sizes, asked: SizeOptions, axes: Sequence[Axis]) -> None:
    after = resized(before, asked.sizes)
    for axis in axes:
        axis.check(family, before, after)


def is_legal(family: Family, before: Sizes, after: Sizes) -> bool:
    """Whether a class and kernels can hold these sizes."""
    return all(axis.problem(family, before, after) is None for axis in axes_of(before))


def within_budget(
    config: Mapping[str, Any], asked: SizeOptions, *, rung: int = 0, carried: bool = False
) -> list[Plan]:
    """All plans on the legal grid that meet the budget.

    Args:
        rung: of the grids of every axis, 0 the coarsest that leaves a choice.
        carried: also those whose sizes the original's class cannot hold, but a carrier can.

    Raises:
        SizeError: there is none.
        UsageError: a budget that is none.
    """
    family, before = read_asked(config, asked)
    whole = Plan(family, before, before)
    grid = combinations(family, before, asked, rung, carried=carried)
    plans = [Plan(family, before, asked.finished(family, sizes)) for sizes in grid]
    cost, limit = _budget(config, whole, plans, asked)
    fitting = [p for p in plans if cost(p) <= limit]
    if not fitting:
        least = min(plans, key=cost)
        raise SizeError(
            f"no legal sizes come to {_budget_text(asked)}; the smallest are "
            f"{least.in_words()} with {least.parameters_after:,} parameters "
            f"({least.ratio:.2f}x): ask for at least that"
        )
    return fitting


def num_rungs(config: Mapping[str, Any], asked: SizeOptions) -> int:
    """How many grids there are, from the coarsest that leaves a choice to the finest."""
    family, before = read_asked(config, asked)
    return max(len(axis.grids(family, before)) for axis in axes_of(before))


def combinations(
    family: Family, before: Sizes, asked: SizeOptions, rung: int, *, carried: bool = False
) -> Iterator[Sizes]:
    """Every combination of legal sizes, where an axis is not given."""
    axes = sorted(axes_of(before), key=lambda axis: bool(axis.depends))
    starts = [before]
    if asked.square:
        starts = square.starts(before, asked.sizes, least=LEAST_SHARE)
        axes = [axis for axis in axes if axis.name not in square.COUPLED]
    for start in starts:
        yield from _combined(family, before, start, axes, asked, rung, carried)


def _combined(
    family: Family,
    before: Sizes,
    sizes: Sizes,
    axes: Sequence[Axis],
    asked: SizeOptions,
    rung: int,
    carried: bool,
) -> Iterator[Sizes]:
    if not axes:
        yield sizes
        return
    axis, *others = axes
    for size in grid_of(axis, family, before, asked, rung):
        after = axis.resized(sizes, size)
        free = carried or asked.sizes or not axis.everywhere
        if not free and _leaves_its_class(family, after):
            continue
        if axis.problem(family, before, after) is None:
            yield from _combined(family, before, after, others, asked, rung, carried)


def grid_of(
    axis: Axis, family: Family, before: Sizes, asked: SizeOptions, rung: int
) -> Sequence[int]:
    """The sizes of one axis that are searched: the one that was asked for, or a grid."""
    if axis.name in asked.sizes:
        return [asked.sizes[axis.name]]
    if not asked.may_cut(axis):
        return [axis.size(before)]
    grids = axis.grids(family, before)
    return grids[min(rung, len(grids) - 1)]


# What a grid leaves of a budget ------------------------------------------------------------------


def closest(
    config: Mapping[str, Any],
    asked: SizeOptions,
    plans: Iterable[Plan],
    accept: Callable[[Plan], bool] = lambda plan: True,
) -> Plan:
    """The best of these plans, filled; of the first few one that comes to the budget, if that falls
    short.

    Args:
        plans: the best first; at least one is accepted.
    """
    found = []
    for decided in islice(filter(accept, plans), TRIED):
        found.append(filled(config, asked, decided, accept))
        if shortfall(config, asked, found[-1]) is None:
            return found[-1]
    return found[0]


def filled(
    config: Mapping[str, Any],
    asked: SizeOptions,
    decided: Plan,
    accept: Callable[[Plan], bool] = lambda plan: True,
) -> Plan:
    """The plan with axes widened off the grid where it falls short of the budget.

    One axis at a time, the one that comes closest; of sizes that are close enough, the roundest. A
    budget of time is left as it is: times between the measured sizes are not known that well.

    Args:
        accept: what else a plan must satisfy.
    """
    if asked.latency is not None:
        return decided
    cost, limit = _budget(config, decided, [decided], asked)
    while cost(decided) < CLOSE * limit:
        fitting = [p for p in _widened(decided, asked) if cost(p) <= limit and accept(p)]
        same = [p for p in fitting if p.carrier is decided.carrier]
        wider = same or fitting
        if not wider:
            break
        decided = max(wider, key=lambda p: (min(cost(p), CLOSE * limit), _roundness(p), cost(p)))
    return decided


def shortfall(config: Mapping[str, Any], asked: SizeOptions, decided: Plan) -> str | None:
    """In words, that a plan is more than 1 % below its budget; None: it is not.

    Names the legal sizes next to the budget on both sides.
    """
    if not asked.budgeted or asked.latency is not None:
        return None
    cost, limit = _budget(config, decided, [decided], asked)
    if cost(decided) >= CLOSE * limit:
        return None
    wider = list(_widened(decided, asked))
    if not wider:  # all that may leave has its original size: what left besides was enough
        return None
    beyond = [p for p in wider if cost(p) > limit]
    near = [decided, *sorted(beyond, key=cost)[:1]]
    return (
        f"no legal sizes that were found come within 1 % of {_budget_text(asked)}; the nearest are "
        + " and ".join(f"{p.in_words()} ({p.ratio:.3f}x)" for p in near)
        + "; give sizes by number for others"
    )


def _widened(decided: Plan, asked: SizeOptions) -> Iterator[Plan]:
    """Every legal plan that is wider on one axis of those that are free."""
    held = square.COUPLED if asked.square else ()
    for axis in axes_of(decided.before):
        if axis.name in asked.sizes or axis.name in held or not asked.may_cut(axis):
            continue
        for size in range(axis.size(decided.after) + 1, axis.size(decided.before) + 1):
            after = axis.resized(decided.after, size)
            if is_legal(decided.family, decided.before, after):
                yield replace(decided, after=after)


def _roundness(decided: Plan) -> int:
    """The power of two in all sizes together: kernels like multiples of large ones."""
    sizes = (axis.size(decided.after) for axis in axes_of(decided.before))
    return math.prod(size & -size for size in sizes)


Cost = Callable[[Plan], float]


def _budget(
    config: Mapping[str, Any], whole: Plan, plans: list[Plan], asked: SizeOptions
) -> tuple[Cost, float]:
    """What a plan costs, and the most it may."""
    if asked.params is not None:
        return lambda p: p.parameters_after, parse_budget(asked.params, whole.parameters_before)
    if asked.size is not None:
        each = bytes_per_parameter(config)
        return lambda p: each * p.parameters_after, parse_size(
            asked.size, each * whole.parameters_before
        )
    from dotexport.sizes.latency import meter  # needs torch

    return meter(config, whole, plans, asked)


def _budget_text(asked: SizeOptions) -> str:
    budgets = {"parameters": asked.params, "bytes": asked.size, "time": asked.latency}
    return next(f"a budget of {text} {what}" for what, text in budgets.items() if text)


def parse_budget(text: str, original: int) -> int:
    """Parameters from `0.7x`, `5.2M`, `6e9` or `5200000`.

    >>> parse_budget("0.5x", 1000), parse_budget("1.5K", 9000)
    (500, 1500)

    Raises:
        UsageError: not a budget, or not smaller than the original.
    """
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    return _parse("--params", text, original, units, "0.7x, 5.2M, 6e9 or 5200000", "parameters")


def parse_size(text: str, original: int) -> int:
    """Bytes from `0.7x`, `300MB`, `1.5GB` or `300000000`.

    Raises:
        UsageError: not a budget, or not smaller than the original.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return _parse("--size", text, original, units, "0.7x, 300MB or 1.5GB", "bytes")


def _parse(
    flag: str, text: str, original: int, units: Mapping[str, int], expected: str, what: str
) -> int:
    known = {"": 1, "x": original, **units}
    match = re.fullmatch(rf"({NUMBER})({'|'.join(known)})", text.strip())
    if not match:
        raise UsageError(f"{flag} {text!r} is no budget; expected {expected}")
    unit = known[match[2]]
    budget = float(match[1]) * unit
    if not 1 <= budget <= original:
        hint = f"; did you mean {text}x?" if unit == 1 and budget < 1 else ""
        raise UsageError(
            f"{flag} {text} is {budget:,.6g} {what}; expected at least 1 and at most the "
            f"original's {original:,}{hint}"
        )
    return round(budget)


def bytes_per_parameter(config: Mapping[str, Any]) -> int:
    """Of the type the weights are stored in, as config.json says; float32 where it does not."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"float16": 2, "bfloat16": 2, "float64": 8}.get(name, 4)
