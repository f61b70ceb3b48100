"""Which sizes: the legal ones, and how a budget is shared between the axes.

Reads config.json only; no weights, no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dotexport.errors import SizeError, UsageError
from dotexport.families import (
    Family,
    Sizes,
    check_quantised,
    find_family,
    num_parameters,
    read_sizes,
)

# Below 8 no runtime's kernels are made for it; the larger steps are those that kernels like.
FLOOR = 8
STEPS = ((2048, 128), (1024, 64), (256, 32), (0, FLOOR))
# Narrower than this share of the original, an axis is not searched.
LEAST_SHARE = 0.25
# How much a cut of the residual width hurts, against the same share cut from the MLP.
RESIDUAL_WEIGHT = 2.0


@dataclass(frozen=True)
class Plan:
    """Sizes before and after, and what they cost."""

    family: Family
    before: Sizes
    after: Sizes

    @property
    def parameters_before(self) -> int:
        return num_parameters(self.family, self.before)

    @property
    def parameters_after(self) -> int:
        return num_parameters(self.family, self.after)

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


def plan(
    config: Mapping[str, Any],
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    params: str | None = None,
) -> Plan:
    """Decide the sizes: those asked for, or the best legal ones within a parameter budget.

    Args:
        params: `0.7x` of the original, or a number such as `5.2M` or `6e9`. Together with one
            explicit size, the budget decides the other axis.

    Raises:
        SizeError: a size no consumer could load, or a budget no legal sizes meet.
        UsageError: nothing was asked for.
        UnsupportedModelError: no family table, or weights that are quantised already.
    """
    check_quantised(config)
    family = find_family(config)
    before = read_sizes(family, config)
    if hidden_size is None and intermediate_size is None and params is None:
        raise UsageError("say how narrow: --params 0.7x, or --hidden N and/or --intermediate N")
    if hidden_size is not None:
        check_hidden(family, before, hidden_size)
    if intermediate_size is not None:
        check_intermediate(before, intermediate_size)
    if params is None:
        after = before.narrowed(
            hidden_size or before.hidden_size, intermediate_size or before.intermediate_size
        )
        return Plan(family, before, after)
    budget = parse_budget(params, num_parameters(family, before))
    hiddens = [hidden_size] if hidden_size else hidden_choices(family, before)
    mlps = [intermediate_size] if intermediate_size else intermediate_choices(before)
    return _within(family, before, budget, hiddens, mlps)


def _within(
    family: Family, before: Sizes, budget: int, hiddens: list[int], mlps: list[int]
) -> Plan:
    plans = [Plan(family, before, before.narrowed(h, m)) for h in hiddens for m in mlps]
    fitting = [p for p in plans if p.parameters_after <= budget]
    if not fitting:
        least = min(plans, key=lambda p: p.parameters_after)
        raise SizeError(
            f"no legal sizes come to {budget:,} parameters; the smallest are hidden "
            f"{least.after.hidden_size}, intermediate {least.after.intermediate_size} with "
            f"{least.parameters_after:,} ({least.ratio:.2f}x): ask for at least that"
        )
    return min(fitting, key=lambda p: (strain(before, p.after), -p.parameters_after))


def strain(before: Sizes, after: Sizes) -> float:
    """How much a cut is expected to cost; smaller is better. The first allocation rule.

    A quadratic in the share cut from each axis: cuts hurt little at first and then more, so the
    rule shares a budget between the axes instead of emptying one.
    """
    hidden = 1 - after.hidden_size / before.hidden_size
    mlp = 1 - after.intermediate_size / before.intermediate_size
    return RESIDUAL_WEIGHT * hidden**2 + mlp**2


def hidden_choices(family: Family, sizes: Sizes) -> list[int]:
    """Legal hidden sizes on the coarsest grid that still leaves a choice, the original included."""
    for step in _steps(sizes.hidden_size):
        grid = math.lcm(step, sizes.num_attention_heads) if family.divides else step
        choices = _multiples(grid, sizes.hidden_size)
        if len(choices) >= 4:
            break
    return sorted({*choices, sizes.hidden_size})


def intermediate_choices(sizes: Sizes) -> list[int]:
    """Legal MLP sizes on the coarsest grid that still leaves a choice, the original included."""
    for step in _steps(sizes.intermediate_size):
        choices = _multiples(step, sizes.intermediate_size)
        if len(choices) >= 4:
            break
    return sorted({*choices, sizes.intermediate_size})


def check_hidden(family: Family, sizes: Sizes, hidden_size: int) -> None:
    """Refuse a residual width that the class or the kernels cannot hold.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    grid = math.lcm(FLOOR, sizes.num_attention_heads) if family.divides else FLOOR
    why = f"{FLOOR}"
    if family.divides:
        why += f" and of the {sizes.num_attention_heads} attention heads ({family.architecture})"
    _check("hidden", hidden_size, sizes.hidden_size, grid, why)


def check_intermediate(sizes: Sizes, intermediate_size: int) -> None:
    """Refuse an MLP width that the kernels cannot hold.

    Raises:
        SizeError: naming the nearest legal ones.
    """
    _check("intermediate", intermediate_size, sizes.intermediate_size, FLOOR, f"{FLOOR}")


def _check(axis: str, asked: int, original: int, grid: int, why: str) -> None:
    if asked == original or (0 < asked < original and asked % grid == 0):
        return
    legal = sorted({*range(grid, original, grid), original})
    nearest = [size for size in legal if size < asked][-1:] + [s for s in legal if s > asked][:1]
    problem = (
        f"is wider than the original's {original}"
        if asked > original
        else f"is not a positive multiple of {why}"
    )
    raise SizeError(
        f"--{axis} {asked} {problem}; the nearest legal: {' and '.join(map(str, nearest))}"
    )


def parse_budget(text: str, original: int) -> int:
    """Parameters from `0.7x`, `5.2M`, `6e9` or `5200000`.

    >>> parse_budget("0.5x", 1000), parse_budget("1.5K", 9000)
    (500, 1500)

    Raises:
        UsageError: not a budget, or not smaller than the original.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)([xKMB]?)", text.strip())
    if not match:
        raise UsageError(f"--params {text!r} is no budget; expected 0.7x, 5.2M, 6e9 or 5200000")
    unit = {"x": original, "K": 10**3, "M": 10**6, "B": 10**9, "": 1}[match[2]]
    budget = float(match[1]) * unit
    if not 1 <= budget <= original:
        hint = f"; did you mean {text}x?" if unit == 1 and budget < 1 else ""
        raise UsageError(
            f"--params {text} is {budget:,.6g} parameters; expected at least 1 and at most the "
            f"original's {original:,}{hint}"
        )
    return round(budget)


def _steps(width: int) -> list[int]:
    return [step for least, step in STEPS if width >= least]


def _multiples(grid: int, width: int) -> list[int]:
    return [size for size in range(grid, width + 1, grid) if size >= LEAST_SHARE * width]
