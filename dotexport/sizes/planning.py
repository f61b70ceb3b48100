"""The plan verb: sizes that every named runtime takes, and what they cost. Reads config.json only.

Of the sizes within the budget, the best that every rule accepts are taken: rules are what a target
says of a config, rows that fill its quantisation groups, and an even split over devices. A rule
binds if better sizes would be taken without it.

Shapes: N windows, L tokens of a window, D width before, K after, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch

from dotexport.axes import axes_of
from dotexport.axes.carrying import planned_config
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.errors import SizeError, UnsupportedModelError
from dotexport.exports.target import Target, resolve_for_plan
from dotexport.healing.heal_options import HealOptions
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes, cached_numbers, shapes
from dotexport.narrowing.prepare import pick_device, usual_passes
from dotexport.sizes.allocation import CHECKED, rehearsals
from dotexport.sizes.budget import (
    bytes_per_parameter,
    check_sizes,
    closest,
    num_rungs,
    plan,
    preference,
    read_asked,
    shortfall,
    strain,
    within_budget,
)
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.effort import allocation_seconds, distillation_seconds, shrink_seconds
from dotexport.sizes.frozen import frozen
from dotexport.sizes.full_rows import advice
from dotexport.sizes.plan_file import KEY, as_flags, fingerprint
from dotexport.sizes.sharing import exchanged_bytes
from dotexport.sizes.shrink_memory import shrink_memory, usual_window

BUDGET = "the budget"
FINER = 0.9  # sizes off the best grid must be expected to cost this much less
CACHE_BYTES = 4  # of a number in the KV cache, where a target does not say
TRAINING_FREE = "as they are without healing"


@dataclass(frozen=True)
class Rule:
    """Something the sizes must satisfy; `problems` says all that is wrong with some."""

    name: str
    problems: Callable[[Plan], Sequence[str]]


@dataclass(frozen=True)
class Costs:
    """What a model takes, before and after narrowing; bytes.

    Attributes:
        artifacts: NAME-PRECISION -> of the weights it stores.
        cache_per_token: NAME-PRECISION -> of keys and values of one token of one sequence.
        shrink_memory: peak of narrowing it, estimated.
        shrink_seconds: of narrowing it on this machine, estimated (effort.py).
        allocation_seconds: of measuring cuts before that, where a budget is shared so; the sizes
            may then be others than those of the plan.
        disk: weights in hf/ and all artifacts after narrowing.
        distillation_seconds: of distilling it behind that, where it is asked for.
        judged: how the last few sizes are judged, where cuts are measured.
        processes: that share the work; memory is of each.
        exchanged: what they send each other while they narrow (sharing.py).
    """

    artifacts: Mapping[str, tuple[int, int]]
    cache_per_token: Mapping[str, tuple[int, int]]
    shrink_memory: int
    shrink_seconds: float
    allocation_seconds: float
    disk: int
    distillation_seconds: float | None = None
    judged: str = TRAINING_FREE
    processes: int = 1
    exchanged: int = 0

    def of_processes(self) -> dict[str, int]:
        """What a document says of several."""
        several = {"processes": self.processes, "exchanged_bytes": self.exchanged}
        return several if self.processes > 1 else {}


@dataclass(frozen=True)
class Choice:
    """A plan, what decided it, and what it costs.

    Attributes:
        flags: of shrink, for the sizes of the plan (plan_file.py).
        config_sha256: which model it is a plan of.
        shortfall: in words, that it is more than 1 % below its budget.
        frozen: in words, each axis that could not be cut, and why (frozen.py).
        vocabulary: which tokens stay, where some leave (vocabulary_first.py).
    """

    plan: Plan
    binding: Sequence[str]
    costs: Costs = field(repr=False)
    flags: Mapping[str, Any]
    config_sha256: str
    shortfall: str | None = None
    frozen: Sequence[str] = ()
    vocabulary: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.plan.as_dict(),
            "config_sha256": self.config_sha256,
            KEY: dict(self.flags),
            "architecture": self.plan.architectures,
            "binding": list(self.binding),
            **({"shortfall": self.shortfall} if self.shortfall else {}),
            **({"frozen": list(self.frozen)} if self.frozen else {}),
            "artifact_bytes": {k: list(v) for k, v in self.costs.artifacts.items()},
            "kv_cache_bytes_per_token": {k: list(v) for k, v in self.costs.cache_per_token.items()},
            "shrink_memory_bytes": self.costs.shrink_memory,
            "shrink_seconds": round(self.costs.shrink_seconds, 1),
            **self.costs.of_processes(),
            "allocation_seconds": round(self.costs.allocation_seconds, 1),
            **({"judged": self.costs.judged} if self.costs.allocation_seconds else {}),
            **(
                {}
                if self.costs.distillation_seconds is None
                else {"distillation_seconds": round(self.costs.distillation_seconds, 1)}
            ),
            "disk_bytes": self.costs.disk,
            **({"vocabulary": self.vocabulary} if self.vocabulary else {}),
        }


def choose(config: Mapping[str, Any], asked: SizeOptions, where: Deployment) -> Choice:
    """The best sizes that every rule accepts.

    Raises:
        SizeError: there are none, with every reason.
        UsageError, UnsupportedModelError, RuntimeMissingError.
    """
    targets = [resolve_for_plan(spec) for spec in where.targets]
    rules = [
        *_splitting(where),
        *(rule for pair in targets for rule in rules_of_target(config, *pair)),
    ]
    wishes = [wish for pair in targets for wish in _wishes(*pair)] if asked.budgeted else []
    decided, plans = _decide(_candidates(config, asked), [*rules, *wishes])
    if decided is not None:
        rules += wishes
    elif wishes:
        decided, plans = _decide(_candidates(config, asked), rules)
    if decided is not None:
        binding = [
            rule.name
            for rule in rules
            if _first(plans, [other for other in rules if other is not rule]) != decided
        ]
        planned_config(config, decided)  # refuses what shrink would refuse
        if asked.budgeted:
            accepted = lambda p: _first([p], rules) is not None  # noqa: E731
            decided = closest(config, asked, [decided, *plans], accepted)
        if asked.square and _others_without_square(config, asked, where, decided):
            binding.append("square")
        if asked.budgeted:
            binding.append(BUDGET)
        looks = rehearsals(decided, plans) if asked.budgeted else ([], [])
        costs = _costs(config, decided, targets, *looks)
        flags = as_flags(decided, asked)
        short = shortfall(config, asked, decided)
        whole = frozen(config, asked, decided, {rule.name: rule.problems for rule in rules})
        return Choice(decided, binding, costs, flags, fingerprint(config), short, whole)
    # The finest grid has none either: say what is wrong with the sizes that come nearest.
    wrong = [f"  {rule.name}: {text}" for rule in rules for text in rule.problems(plans[0])]
    raise SizeError(
        f"no sizes satisfy all of what was asked for; {plans[0].in_words()} fail in:\n"
        + "\n".join([*wrong, *ways_out(config, plans, targets, rules)])
    )


def calibrated(
    config: Mapping[str, Any],
    chosen: Choice,
    samples: int,
    seqlen: int | None,
    heal: HealOptions | None = None,
    processes: int = 1,
) -> Choice:
    """The choice with the time and memory of narrowing on so many windows of so many tokens.

    Args:
        seqlen: None: what shrink takes by default.
        heal: distillation besides.
        processes: that share it (torchrun), each as fast as this one.
    """
    window, decided = seqlen or usual_window(config), chosen.plan.on_kept_tokens
    costs = chosen.costs
    trial = heal.trial(window) if heal else None
    if trial is not None and costs.allocation_seconds:
        each = distillation_seconds(chosen.plan, trial, samples=samples, seqlen=window)
        costs = replace(
            costs,
            allocation_seconds=costs.allocation_seconds + CHECKED * each,
            judged=f"the last few behind a distillation on {trial.tokens:,} tokens",
        )
    shared = {"samples": samples, "seqlen": window, "processes": processes}
    costs = replace(
        costs,
        shrink_memory=shrink_memory(config, decided, **shared),
        shrink_seconds=shrink_seconds(decided, passes=_passes(config, decided), **shared),
        distillation_seconds=distillation_seconds(chosen.plan, heal, **shared) if heal else None,
        processes=processes,
        exchanged=0 if processes == 1 else exchanged_bytes(decided, samples=samples, seqlen=window),
    )
    return replace(chosen, costs=costs)


def ways_out(
    config: Mapping[str, Any],
    plans: Sequence[Plan],
    targets: Sequence[tuple[Target, str]],
    rules: Sequence[Rule],
) -> Iterator[str]:
    """For each target that no plan satisfies: other precisions that some do, and sizes that would
    fill the rows of this one."""
    for target, precision in targets:
        mine = {rule.name for rule in rules_of_target(config, target, precision)}
        others = [rule for rule in rules if rule.name not in mine]
        if _first(plans, others) is None or _first(plans, rules) is not None:
            continue
        takes = [
            f"{target.name}:{other}"
            for other in getattr(target, "precisions", ())
            if _first(plans, [*others, *rules_of_target(config, target, other)]) is not None
        ]
        if takes:
            yield f"{', '.join(takes)}: there are such sizes"
        if group := getattr(target, "row_groups", {}).get(precision):
            yield f"{target.name}:{precision}: {advice(config, group)}"


def _decide(grids: Iterable[list[Plan]], rules: Sequence[Rule]) -> tuple[Plan | None, list[Plan]]:
    """The best accepted plan of the coarsest grid that has one, and that grid.

    Where rules cost sizes there, the next finer grid is looked at too: of 28 heads, Llama form
    leaves every seventh size on a grid of 128, and a grid of 64 has one between.
    """
    decided, on = None, list[Plan]()
    for plans in grids:
        found = _first(plans, rules)
        if decided is not None:
            better = found is not None and strain(found) < FINER * strain(decided)
            return (found, plans) if better else (decided, on)
        decided, on = found, plans
        if found == plans[0]:
            break
    return decided, on


def _others_without_square(
    config: Mapping[str, Any], asked: SizeOptions, where: Deployment, decided: Plan
) -> bool:
    free = choose(config, replace(asked, square=False), where).plan
    return free.after != decided.after


def _candidates(config: Mapping[str, Any], asked: SizeOptions) -> Iterable[list[Plan]]:
    """Plans, the best first, on finer and finer grids."""
    if not asked.budgeted:
        yield [plan(config, asked)]
        return
    asked = check_sizes(*read_asked(config, asked), asked)
    for rung in range(num_rungs(config, asked)):
        yield sorted(within_budget(config, asked, rung=rung), key=preference)


def _first(plans: Iterable[Plan], rules: Sequence[Rule]) -> Plan | None:
    return next((p for p in plans if not any(rule.problems(p) for rule in rules)), None)


# Rules ------------------------------------------------------------------------------------------


def _splitting(where: Deployment) -> list[Rule]:
    rules = []
    if (devices := where.tensor_parallel) > 1:
        rules.append(Rule(f"tensor-parallel {devices}", partial(_uneven, devices)))
    if where.group > 1:
        rules.append(Rule(f"group {where.group}", partial(_torn, where.group, devices)))
    return rules


def _uneven(devices: int, decided: Plan) -> list[str]:
    """What does not split evenly over devices."""
    return [text for axis in axes_of(decided.after) for text in axis.uneven(decided.after, devices)]


def _torn(group: int, devices: int, decided: Plan) -> list[str]:
    """Rows that end inside a group of weights."""
    return [
        text for axis in axes_of(decided.after) for text in axis.torn(decided.after, group, devices)
    ]


def rules_of_target(config: Mapping[str, Any], target: Target, precision: str) -> list[Rule]:
    """What sizes must satisfy for an artifact of this precision."""
    name = _name(target, precision)
    rules = []
    ask = getattr(target, "config_problems", None)  # of a third party's, the exporter asks more

    @cache
    def problems(decided: Plan) -> Sequence[str]:
        try:
            written: list[str] = ask(planned_config(config, decided), precision) if ask else []
        except UnsupportedModelError as error:
            written = [str(error)]
        return written

    rules.append(Rule(name, problems))
    if group := getattr(target, "row_groups", {}).get(precision):
        rules.append(Rule(f"{name}, rows of {group}", partial(_torn, group, 1)))
    return rules


def _wishes(target: Target, precision: str) -> list[Rule]:
    """What a budget keeps to where it can: rows that a target stores in its best form."""
    group = getattr(target, "best_rows", {}).get(precision)
    name = _name(target, precision)
    return [Rule(f"{name}, rows of {group}", partial(_torn, group, 1))] if group else []


def _name(target: Target, precision: str) -> str:
    return target.name if precision == "as-stored" else f"{target.name}-{precision}"


# Costs ------------------------------------------------------------------------------------------


def _costs(
    config: Mapping[str, Any],
    decided: Plan,
    targets: Sequence[tuple[Target, str]],
    rehearsed: Sequence[Plan],
    checked: Sequence[Plan],
) -> Costs:
    stored = bytes_per_parameter(config)
    before, after = decided.before, decided.carried_after
    written = stored * decided.parameters_after
    artifacts = {"hf": (stored * decided.parameters_before, written)}
    cache_bytes = {"hf": stored}
    for target, precision in targets:
        if count := _counter(target, precision):
            one, two = count(decided.family, before), count(decided.carrier, after)
            artifacts[_name(target, precision)] = one, two
            cache_bytes[_name(target, precision)] = bytes_of_cached_number(target, precision)
    return Costs(
        artifacts,
        {
            name: (
                cached_numbers(decided.family, before) * each,
                cached_numbers(decided.carrier, after) * each,
            )
            for name, each in cache_bytes.items()
        },
        shrink_memory(config, decided.on_kept_tokens),
        shrink_seconds(
            decided.on_kept_tokens, seqlen=usual_window(config), passes=_passes(config, decided)
        ),
        allocation_seconds(
            rehearsed, checked, seqlen=usual_window(config), passes=_passes(config, decided)
        ),
        sum(pair[1] for pair in artifacts.values()),
    )


def bytes_of_cached_number(target: Target, precision: str) -> int:
    """Of a number in the cache: one for all precisions of a target, or by precision."""
    said: int | Mapping[str, int] = getattr(target, "cache_bytes", CACHE_BYTES)
    return said[precision] if isinstance(said, Mapping) else said


def _counter(target: Target, precision: str) -> Callable[[Family, Sizes], int] | None:
    """How a target counts what it stores: by itself, or by bits of a weight."""
    if own := getattr(target, "stored_bytes", None):
        return partial(own, precision=precision)
    bits = getattr(target, "weight_bits", {}).get(precision)
    return partial(weight_bytes, bits=bits) if bits else None


def weight_bytes(family: Family, sizes: Sizes, bits: Sequence[float]) -> int:
    """Of all weights as a target stores them; norms and biases in float32.

    Args:
        bits: of a weight in a matrix product, in a table that is looked up alone, and in one that
            the head multiplies with too, where that is not stored as matrices are.
    """
    matrix, looked_up, *shared = bits
    table = f"{family.embedding}.weight"
    of_table = [*shared, matrix][0] if sizes.tied else looked_up
    total = 0.0
    for name, shape in shapes(family, sizes):
        each = of_table if name == table else matrix if len(shape) > 1 else 32
        total += each * math.prod(shape)
    return round(total / 8)


def _passes(config: Mapping[str, Any], decided: Plan) -> torch.dtype:
    """What passes over the text multiply in, where config.json says how weights are stored."""
    name = str(config.get("dtype") or config.get("torch_dtype"))
    stored = torch.bfloat16 if name == "bfloat16" else torch.float32
    return usual_passes(decided.before.spaces["residual"], {stored}, pick_device("auto"))
