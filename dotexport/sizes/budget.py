"""Which sizes: the legal ones, and how a budget is shared between the axes.

Reads config.json only; no weights, no torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dotexport.errors import SizeError, UsageError
from dotexport.models.families import carried_biases, check_quantised, find_carrier, find_family
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes, num_parameters, read_sizes
from dotexport.sizes.square import pairs_with

# Below 8 no runtime's kernels are made for it; the larger steps are those that kernels like.
FLOOR = 8
STEPS = ((2048, 128), (1024, 64), (256, 32), (0, FLOOR))
# Narrower than this share of the original, an axis is not searched.
LEAST_SHARE = 0.25
# How much a cut of the residual width hurts, against the same share cut from the MLP.
RESIDUAL_WEIGHT = 4.0
# The same for KV groups (docs/log.md says where both come from).
HEADS_WEIGHT = 1.5
NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][0-9]+)?"


@dataclass(frozen=True)
class Plan:
    """Sizes before and after, and what they cost."""

    family: Family
    before: Sizes
    after: Sizes

    @property
    def carrier(self) -> Family:
        """The class that is written: of those that compute the same, the first that can hold it."""
        return find_carrier(self.family, self.after)

    @property
    def carried_after(self) -> Sizes:
        """The sizes after narrowing in the carrier's words: biases go by other names there."""
        if self.carrier is self.family:
            return self.after
        biases = carried_biases(self.family, self.carrier, self.after)
        return replace(self.after, biases=biases)

    @property
    def architectures(self) -> list[str]:
        """Of the original, and of what is written."""
        return [self.family.architecture, self.carrier.architecture]

    @property
    def parameters_before(self) -> int:
        return num_parameters(self.family, self.before)

    @cached_property
    def parameters_after(self) -> int:
        return num_parameters(self.carrier, self.carried_after)

    @property
    def ratio(self) -> float:
        return self.parameters_after / self.parameters_before

    def as_dict(self) -> dict[str, Any]:
        rows = {}
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
            rows[name] = [getattr(self.before, name), getattr(self.after, name)]
        rows["num_key_value_heads"] = [
            self.before.num_key_value_heads,
            self.after.num_key_value_heads,
        ]
        rows["tie_word_embeddings"] = [self.before.tied, self.after.tied]
        rows["parameters"] = [self.parameters_before, self.parameters_after]
        return rows


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How narrow.

    Attributes:
        hidden_size, intermediate_size, num_key_value_heads: explicit sizes; None leaves an axis to
            the budget, or as it is.
        params: budget of parameters, `0.7x` of the original or a number such as `5.2M` or `6e9`.
        size: budget of bytes as stored, `0.7x`, `300MB` or `1.5GB`.
        latency: budget of time on this device, such as `0.8x` of the original's per decoded token
            (latency.py).
        latency_table: what was measured for it: a file, or a runtime whose table is in the cache.
        force_latency_table: take a table of another device, release or runtime.
        tied: False gives a shared embedding and head tables of their own; None keeps what is.
        bias: whether linears get biases where the class has them and the original does not.
        square: whether heads leave along with the width, so that hidden_size is heads x head_dim,
            for consumers that take head_dim to be hidden_size / heads (square.py).
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    params: str | None = None
    size: str | None = None
    latency: str | None = None
    latency_table: str | None = None
    force_latency_table: bool = False
    tied: bool | None = None
    bias: bool = False
    square: bool = False

    def __post_init__(self) -> None:
        if sum(budget is not None for budget in (self.params, self.size, self.latency)) > 1:
            raise UsageError("give one budget: --params, --size or --latency")
        if self.latency is None and (self.latency_table or self.force_latency_table):
            raise UsageError("--latency-table serves a budget of time; give --latency 0.8x as well")

    @property
    def budgeted(self) -> bool:
        return any(budget is not None for budget in (self.params, self.size, self.latency))

    @property
    def explicit(self) -> bool:
        sizes = (self.hidden_size, self.intermediate_size, self.num_key_value_heads)
        return any(size is not None for size in sizes)


def plan(config: Mapping[str, Any], asked: SizeOptions) -> Plan:
    """Decide the sizes: those asked for, or the best legal ones within a parameter budget.

    Raises:
        SizeError: a size no consumer could load, or a budget no legal sizes meet.
        UsageError: nothing was asked for.
        UnsupportedModelError: no family table, or weights that are quantised already.
    """
    family, before = read_model(config)
    if not asked.explicit and not asked.budgeted:
        raise UsageError(
            "say how narrow: --params 0.7x (or --size, --latency), or --hidden N, --intermediate N "
            "and/or --kv-heads N"
        )
    asked = check_sizes(family, before, asked)
    if not asked.budgeted:
        return Plan(family, before, _narrowed(family, before, asked))
    return min(within_budget(config, asked), key=preference)


def preference(decided: Plan) -> tuple[float, int]:
    """What plans are sorted by, the best first."""
    return strain(decided.before, decided.after), -decided.parameters_after


def read_model(config: Mapping[str, Any]) -> tuple[Family, Sizes]:
    """Family table and sizes of a config.json.

    Raises:
        UnsupportedModelError: no family table, or weights that are quantised already.
        CheckpointError: sizes are missing.
    """
    check_quantised(config)
    family = find_family(config)
    return family, read_sizes(family, config)


def check_sizes(family: Family, before: Sizes, asked: SizeOptions) -> SizeOptions:
    """Refuse explicit sizes that the class or the kernels cannot hold.

    Returns:
        What was asked for; of a square pair, what the sizes that were given leave no choice of.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    if asked.num_key_value_heads is not None:
        check_groups(before, asked.num_key_value_heads)
    if asked.square:
        given = (asked.hidden_size, asked.num_key_value_heads)
        pairs = pairs_with(before, *given, multiple=FLOOR)
        if len(pairs) == 1 or not asked.budgeted:
            asked = replace(asked, hidden_size=pairs[-1][0], num_key_value_heads=pairs[-1][1])
    heads = before.narrowed(num_key_value_heads=asked.num_key_value_heads)
    if asked.hidden_size is not None or (asked.num_key_value_heads and not asked.budgeted):
        check_hidden(family, heads, asked.hidden_size or before.hidden_size)
    if asked.intermediate_size is not None:
        check_intermediate(before, asked.intermediate_size)
    return asked


def within_budget(
    config: Mapping[str, Any], asked: SizeOptions, *, step: int | None = None
) -> list[Plan]:
    """All plans on the legal grid that meet the budget.

    Args:
        step: of the grid of hidden sizes; None: the coarsest that leaves a choice.

    Raises:
        SizeError: there is none.
        UsageError: a budget that is none.
    """
    family, before = read_model(config)
    whole = Plan(family, before, before)
    grid = _grid(family, before, asked, step or hidden_step(family, before))
    plans = [Plan(family, before, _narrowed(family, before, choice)) for choice in grid]
    cost, limit = _budget(config, whole, plans, asked)
    fitting = [p for p in plans if cost(p) <= limit]
    if not fitting:
        least = min(plans, key=cost)
        raise SizeError(
            f"no legal sizes come to {_budget_text(asked)}; the smallest are hidden "
            f"{least.after.hidden_size}, intermediate {least.after.intermediate_size}, KV heads "
            f"{least.after.num_key_value_heads} with {least.parameters_after:,} parameters "
            f"({least.ratio:.2f}x): ask for at least that"
        )
    return fitting


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
    from dotexport.sizes.latency import meter

    return meter(config, whole, plans, asked)


def _budget_text(asked: SizeOptions) -> str:
    budgets = {"parameters": asked.params, "bytes": asked.size, "time": asked.latency}
    return next(f"a budget of {text} {what}" for what, text in budgets.items() if text)


def _grid(family: Family, before: Sizes, asked: SizeOptions, step: int) -> Iterator[SizeOptions]:
    """Every combination of legal sizes, where an axis is not given."""
    mlps = [asked.intermediate_size] if asked.intermediate_size else intermediate_choices(before)
    widths = _square_widths(before, asked) if asked.square else _widths(family, before, asked, step)
    for (hidden, count), mlp in itertools.product(widths, mlps):
        yield replace(asked, hidden_size=hidden, intermediate_size=mlp, num_key_value_heads=count)


def _widths(
    family: Family, before: Sizes, asked: SizeOptions, step: int
) -> Iterator[tuple[int, int]]:
    """Legal hidden sizes and KV heads."""
    groups = [asked.num_key_value_heads] if asked.num_key_value_heads else group_choices(before)
    for count in groups:
        heads = before.narrowed(num_key_value_heads=count)
        if asked.hidden_size:
            hiddens = [asked.hidden_size] if is_hidden(family, heads, asked.hidden_size) else []
        else:
            hiddens = hidden_choices(family, heads, step)
        yield from ((hidden, count) for hidden in hiddens)


def _square_widths(before: Sizes, asked: SizeOptions) -> list[tuple[int, int]]:
    given = (asked.hidden_size, asked.num_key_value_heads)
    pairs = pairs_with(before, *given, multiple=FLOOR)
    # What was asked for by number is taken however narrow.
    return [p for p in pairs if p[0] >= LEAST_SHARE * before.hidden_size] or pairs


def _narrowed(family: Family, before: Sizes, asked: SizeOptions) -> Sizes:
    after = before.narrowed(
        hidden_size=asked.hidden_size,
        intermediate_size=asked.intermediate_size,
        num_key_value_heads=asked.num_key_value_heads,
        tied=asked.tied,
    )
    if not asked.bias:
        return after
    return replace(after, biases=after.biases | find_carrier(family, after).bias_flags)


def strain(before: Sizes, after: Sizes) -> float:
    """How much a cut is expected to cost; smaller is better. A rule for when nothing is measured.

    A quadratic in the share cut from each axis: cuts hurt little at first and then more, so the
    rule shares a budget between the axes instead of emptying one.
    """
    hidden = 1 - after.hidden_size / before.hidden_size
    mlp = 1 - after.intermediate_size / before.intermediate_size
    heads = 1 - after.num_key_value_heads / before.num_key_value_heads
    return RESIDUAL_WEIGHT * hidden**2 + mlp**2 + HEADS_WEIGHT * heads**2


def group_choices(sizes: Sizes) -> list[int]:
    """Numbers of KV heads that are searched, from half of them on; at most five."""
    count = sizes.num_key_value_heads
    step = max(1, count // 8)
    return [count - step * k for k in range(count // 2 // step, -1, -1)]


def hidden_choices(family: Family, sizes: Sizes, step: int) -> list[int]:
    """Legal hidden sizes that are multiples of `step`, and the original where it is one."""
    whole = [sizes.hidden_size] if is_hidden(family, sizes, sizes.hidden_size) else []
    return sorted({*_multiples(_hidden_grid(family, sizes, step), sizes.hidden_size), *whole})


def hidden_step(family: Family, sizes: Sizes) -> int:
    """The coarsest step that still leaves a choice."""
    for step in hidden_steps(sizes):
        if len(_multiples(_hidden_grid(family, sizes, step), sizes.hidden_size)) >= 4:
            break
    return step


def hidden_steps(sizes: Sizes) -> list[int]:
    """Steps of hidden sizes that kernels like, the coarsest first."""
    return _steps(sizes.hidden_size)


def _hidden_grid(family: Family, sizes: Sizes, step: int) -> int:
    return math.lcm(step, sizes.num_attention_heads) if family.divides else step


def is_hidden(family: Family, sizes: Sizes, hidden_size: int) -> bool:
    """Whether the class can hold this residual width with this number of heads."""
    if family.divides and hidden_size % sizes.num_attention_heads:
        return False
    return hidden_size == sizes.hidden_size or hidden_size % FLOOR == 0


def intermediate_choices(sizes: Sizes) -> list[int]:
    """Legal MLP sizes on the coarsest grid that still leaves a choice, the original included."""
    for step in _steps(sizes.intermediate_size):
        choices = _multiples(step, sizes.intermediate_size)
        if len(choices) >= 4:
            break
    return sorted({*choices, sizes.intermediate_size})


def check_groups(sizes: Sizes, count: int) -> None:
    """Refuse a number of KV heads that is none.

    Raises:
        SizeError.
    """
    most = sizes.num_key_value_heads
    if not 1 <= count <= most:
        raise SizeError(f"--kv-heads {count} is not between 1 and the original's {most}")


def check_hidden(family: Family, sizes: Sizes, hidden_size: int) -> None:
    """Refuse a residual width that the class or the kernels cannot hold.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    grid = math.lcm(FLOOR, sizes.num_attention_heads) if family.divides else FLOOR
    why = f"{FLOOR}"
    if family.divides:
        why += f" and of the {sizes.num_attention_heads} attention heads ({family.architecture})"
    whole = is_hidden(family, sizes, sizes.hidden_size)
    _check("hidden", hidden_size, sizes.hidden_size, grid, why, whole=whole)


def check_intermediate(sizes: Sizes, intermediate_size: int) -> None:
    """Refuse an MLP width that the kernels cannot hold.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    _check("intermediate", intermediate_size, sizes.intermediate_size, FLOOR, f"{FLOOR}")


def _check(
    axis: str, asked: int, original: int, grid: int, why: str, *, whole: bool = True
) -> None:
    legal = set(range(grid, original, grid)) | ({original} if whole else set())
    if asked in legal:
        return
    nearest = sorted(s for s in legal if s < asked)[-1:] + sorted(s for s in legal if s > asked)[:1]
    problem = (
        f"is wider than the original's {original}"
        if asked > original
        else f"is not a positive multiple of {why}"
    )
    legal_ones = " and ".join(map(str, nearest)) or "none"
    raise SizeError(f"--{axis} {asked} {problem}; the nearest legal: {legal_ones}")


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


def _steps(width: int) -> list[int]:
    return [step for least, step in STEPS if width >= least]


def _multiples(grid: int, width: int) -> list[int]:
    return [size for size in range(grid, width + 1, grid) if size >= LEAST_SHARE * width]
