"""Which sizes and how many layers a latency table is measured at."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dotexport.axes.plan import Plan, resized
from dotexport.errors import UsageError
from dotexport.models.shapes import num_parameters
from dotexport.sizes.budget import is_legal
from dotexport.sizes.latency_options import LatencyOptions
from dotexport.sizes.latency_table import Key, key_of, sizes_in_row, table_axes

from .workload import Workload

SHALLOWEST = 2  # layers of the shorter of two depths


def workload_of(options: LatencyOptions, batch: int) -> Workload:
    """The requests of one batch size."""
    return Workload(
        prompt_length=options.prompt,
        generation_length=options.generate,
        batch_size=batch,
        threads=options.threads,
        min_warmups=3,
        max_warmup_seconds=2.0,
        seed=options.seed,
    ).with_threads()


@dataclass(frozen=True)
class Depth:
    """Layers of the model, and of what is measured; `shallow` is None where that is the same."""

    model: int
    measured: int
    shallow: int | None


def depth_of(whole: Plan, options: LatencyOptions) -> Depth:
    num_layers = whole.before.num_layers
    once = num_parameters(whole.family, replace(whole.before, num_layers=0))
    layer = (whole.parameters_before - once) / num_layers
    fitting = int((options.budget / 4 - once) // layer)
    measured = options.layers or max(fitting, 2 * SHALLOWEST)
    if measured >= num_layers or whole.before.kinds:  # the first few need not be of all kinds
        return Depth(num_layers, num_layers, None)
    if measured < 2:
        raise UsageError("--layers 1 of more cannot tell a layer from what comes once; give 2")
    return Depth(num_layers, measured, max(1, min(measured // 2, SHALLOWEST)))


def _spread(choices: Iterable[int], whole: int, options: LatencyOptions) -> list[int]:
    """Some of the choices, evenly, from the least share to the original's."""
    fitting = sorted({c for c in choices if options.least * whole <= c <= whole} | {whole})
    picked = np.linspace(0, len(fitting) - 1, min(options.points, len(fitting)))
    return sorted({fitting[round(n)] for n in picked})


def _choices(whole: Plan) -> list[list[int]]:
    """Legal sizes of every axis of a table, all others uncut, as a budget searches them."""
    family, before = whole.family, whole.before
    return [
        [
            size
            for size in axis.grids(family, before)[0]
            if axis.problem(family, before, axis.resized(before, size)) is None
        ]
        for axis in table_axes()
    ]


def _plan(whole: Plan, key: Key) -> Plan:
    return replace(whole, after=resized(whole.before, sizes_in_row(key)))


def table_sizes(whole: Plan, options: LatencyOptions) -> list[Plan]:
    """For every size of the axis that all matrices have, one with nothing else cut, and cuts of
    each other axis alone."""
    uncut = key_of(whole.before)
    first, *others = (
        _spread(choices, size, options)
        for choices, size in zip(_choices(whole), uncut, strict=True)
    )
    keys = dict.fromkeys(
        (width, *uncut[1:n], size, *uncut[n + 1 :])
        for width in first
        for n, sizes in enumerate(others, start=1)
        for size in sizes
    )
    return [p for p in (_plan(whole, key) for key in keys) if _legal(p)]


def _legal(plan: Plan) -> bool:
    return is_legal(plan.family, plan.before, plan.after)


def otherwise_uncut(plan: Plan) -> bool:
    """Whether nothing is cut but the axis that every matrix has."""
    return key_of(plan.after)[1:] == key_of(plan.before)[1:]


def strangers_of(whole: Plan, sizes: Sequence[Plan], options: LatencyOptions) -> list[Plan]:
    """Legal sizes, most with all axes cut, that the table does not hold."""
    known = {key_of(p.after) for p in sizes}
    axes = [
        [c for c in choices if options.least * size <= c <= size]
        for choices, size in zip(_choices(whole), key_of(whole.before), strict=True)
    ]
    every = [_plan(whole, key) for key in itertools.product(*axes)]
    others = [p for p in every if key_of(p.after) not in known and _legal(p)]
    rng = np.random.default_rng(options.seed)
    drawn = rng.permutation(len(others))[: options.held_out]
    return [others[n] for n in sorted(drawn)]


def shallow_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same model with its first layers alone."""
    changed = dict(config) | {"num_hidden_layers": layers}
    if kinds := config.get("layer_types"):
        changed["layer_types"] = kinds[:layers]
    return changed
