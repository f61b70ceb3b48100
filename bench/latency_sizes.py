"""Which sizes and how many layers a latency table is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dotexport.errors import UsageError
from dotexport.models.shapes import num_parameters
from dotexport.sizes.budget import (
    Plan,
    group_choices,
    hidden_choices,
    hidden_step,
    intermediate_choices,
    is_hidden,
)
from dotexport.sizes.latency_table import Key, key_of

from .workload import Workload

SHALLOWEST = 2  # layers of the shorter of two depths


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What is measured, and how long.

    Attributes:
        target, precision: runtime and type of the artifacts; None: the default of the target.
        batches: sequences at once, each measured.
        prompt, generate: tokens of a prompt, and after it.
        threads: CPU threads; None: one per physical core.
        points: sizes of each axis, the original's among them.
        least: the smallest share of an axis that is measured.
        layers: measured depth; None: all, or as many as `budget` holds.
        budget: bytes of float32 weights up to which all layers are measured.
        rounds: A B B A groups for each size.
        held_out: sizes that are measured to judge the table and are not put into it.
        seed: of token ids and of the choice of these.
    """

    target: str = "ort-cpu"
    precision: str | None = None
    batches: tuple[int, ...] = (1,)
    prompt: int = 64
    generate: int = 32
    threads: int | None = None
    points: int = 5
    least: float = 0.5
    layers: int | None = None
    budget: int = 256_000_000
    rounds: int = 4
    held_out: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("points", 2), ("rounds", 2), ("held_out", 0), ("layers", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{name.replace('_', '-')} is {value}; expected at least {least}")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise UsageError(f"batch {self.batches} must be different numbers of at least 1")
        if not 0 < self.least < 1:
            raise UsageError(f"least is {self.least}; expected a share between 0 and 1")
        self.workload(1)  # checks the rest

    def workload(self, batch: int) -> Workload:
        return Workload(
            prompt_length=self.prompt,
            generation_length=self.generate,
            batch_size=batch,
            threads=self.threads,
            min_warmups=3,
            max_warmup_seconds=2.0,
            seed=self.seed,
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
    if measured >= num_layers:
        return Depth(num_layers, num_layers, None)
    if measured < 2:
        raise UsageError("--layers 1 of more cannot tell a layer from what comes once; give 2")
    return Depth(num_layers, measured, max(1, min(measured // 2, SHALLOWEST)))


def _spread(choices: Iterable[int], whole: int, options: LatencyOptions) -> list[int]:
    """Some of the choices, evenly, from the least share to the original's."""
    fitting = sorted({c for c in choices if options.least * whole <= c <= whole} | {whole})
    picked = np.linspace(0, len(fitting) - 1, min(options.points, len(fitting)))
    return sorted({fitting[round(n)] for n in picked})


def _choices(whole: Plan) -> tuple[list[int], list[int], list[int]]:
    """Legal sizes of hidden, MLP and KV heads, as a budget searches them."""
    family, before = whole.family, whole.before
    hidden = hidden_choices(family, before, hidden_step(family, before))
    return hidden, intermediate_choices(before), group_choices(before)


def _plan(whole: Plan, key: Key) -> Plan:
    hidden, mlp, heads = key
    after = whole.before.narrowed(
        hidden_size=hidden, intermediate_size=mlp, num_key_value_heads=heads
    )
    return replace(whole, after=after)


def table_sizes(whole: Plan, options: LatencyOptions) -> list[Plan]:
    """For every hidden size, one with nothing else cut, and cuts of MLP and KV heads alone."""
    before = whole.before
    hidden, mlp, heads = (
        _spread(choices, size, options)
        for choices, size in zip(_choices(whole), key_of(before), strict=True)
    )
    _, all_mlp, all_heads = key_of(before)
    keys = [
        key
        for h in hidden
        for key in (
            *((h, m, all_heads) for m in mlp),
            *((h, all_mlp, g) for g in heads if g != all_heads),
        )
    ]
    return [p for p in (_plan(whole, key) for key in keys) if _legal(p)]


def _legal(plan: Plan) -> bool:
    return is_hidden(plan.family, plan.after, plan.after.hidden_size)


def only_hidden(plan: Plan) -> bool:
    return key_of(plan.after)[1:] == key_of(plan.before)[1:]


def strangers_of(whole: Plan, sizes: Sequence[Plan], options: LatencyOptions) -> list[Plan]:
    """Legal sizes, most with all axes cut, that the table does not hold."""
    known = {key_of(p.after) for p in sizes}
    axes = [
        [c for c in choices if options.least * size <= c <= size]
        for choices, size in zip(_choices(whole), key_of(whole.before), strict=True)
    ]
    every = [_plan(whole, (h, m, g)) for h in axes[0] for m in axes[1] for g in axes[2]]
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
