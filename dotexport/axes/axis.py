"""An axis: one number of config.json that can be made smaller.

Budgets, plans, allocation, latency tables, estimates, cards and reports walk over `AXES`
(axes/__init__.py) and name none, so a new axis is one file beside this one and one line there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dotexport.errors import SizeError
from dotexport.models.families import find_carrier
from dotexport.models.family import Family
from dotexport.models.shapes import Sizes, cached_numbers, num_multiplications, num_parameters

if TYPE_CHECKING:  # torch takes seconds, and sizes are planned without
    from dotexport.merging.units import Units

FLOOR = 8
"""Below 8 no runtime's kernels are made for a width; the larger steps are those they like."""

STEPS = ((16384, 512), (12288, 256), (2048, 128), (1024, 64), (256, 32), (0, FLOOR))

LEAST_SHARE = 0.25
"""Narrower than this share of the original, an axis is not searched."""

CHOICE = 4
"""Sizes of a grid, at least, that leave a choice."""

OVER = "does not divide over {} devices"


@dataclass(frozen=True)
class Shares:
    """How much of a model has an axis as one of its dimensions, from 0 to 1.

    Attributes:
        parameters: of the weights, and so of their bytes.
        cache: of the keys and values of a token.
        time: of the multiplications that decode one token.
    """

    parameters: float
    cache: float
    time: float


@dataclass(frozen=True)
class Axis(ABC):
    """What is known of one axis; most say no more than the attributes and what is legal.

    Attributes:
        name: its key in config.json, in manifests and reports, and a field of `Sizes`.
        flag: its option on the command line and its key in recipes and plans, `kv_heads`.
        label: at the head of a column.
        help: of the option.
        weight: how much a cut of it is expected to hurt, against the same share cut from the MLP,
            where nothing is measured (docs/log.md).
        exact: what a cut leaves exact, in a sentence.
    """

    name: str
    flag: str
    label: str
    help: str
    weight: float
    exact: str

    keys: ClassVar[tuple[str, ...]] = ()
    """Numbers of config.json that follow it; each is a field of `Sizes` as well."""

    depends: ClassVar[tuple[str, ...]] = ()
    """Axes on whose sizes its legal ones depend: it is chosen after them."""

    everywhere: ClassVar[bool] = False
    """Whether every matrix has it: what other axes cost at one of its sizes says nothing of what
    they cost at another."""

    timed: ClassVar[bool] = True
    """Whether tables of latency measure it, and budgets of time may cut it."""

    # Sizes ------------------------------------------------------------------------------------

    def size(self, sizes: Sizes) -> int:
        found: int = getattr(sizes, self.name)
        return found

    def resized(self, sizes: Sizes, size: int) -> Sizes:
        """The same sizes with another one of this axis, and of whatever follows it."""
        changes: dict[str, Any] = {self.name: size}
        return replace(sizes, **changes)

    @abstractmethod
    def grids(self, family: Family, before: Sizes) -> list[list[int]]:
        """Sizes that are searched, from the coarsest grid that leaves a choice to the finest."""

    def problem(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        """Why no class or kernel holds this size beside the other ones of `after`; None: legal."""
        why = dict(family.stays).get(self.name)
        if (
            why is not None
            and self.size(after) != self.size(before)
            and find_carrier(family, after) is family
        ):
            return f"{why} ({family.architecture})"
        return self.unfit(family, before, after)

    @abstractmethod
    def unfit(self, family: Family, before: Sizes, after: Sizes) -> str | None:
        """The same of a class of which something can leave along this axis."""

    def nearest(self, family: Family, before: Sizes, after: Sizes) -> list[int]:
        """The legal sizes next to this one, all others as in `after`."""
        asked, legal = self.size(after), range(1, self.size(before) + 1)
        around = [
            size
            for size in legal
            if self.problem(family, before, self.resized(after, size)) is None
        ]
        return [s for s in around if s < asked][-1:] + [s for s in around if s > asked][:1]

    def check(self, family: Family, before: Sizes, after: Sizes) -> None:
        """Refuse a size that the class or the kernels cannot hold.

        Raises:
            SizeError: naming the nearest legal ones.
        """
        asked, flag = self.size(after), self.flag.replace("_", "-")
        if not self.size(before):
            raise SizeError(f"--{flag} {asked}: {family.architecture} has no {self.name}")
        if asked > self.size(before):
            wrong: str | None = f"is more than the original's {self.size(before)}"
        else:
            wrong = self.problem(family, before, after)
        if wrong is None:
            return
        legal = " and ".join(map(str, self.nearest(family, before, after))) or "none"
        raise SizeError(f"--{flag} {asked} {wrong}; the nearest legal: {legal}")

    def strain(self, before: Sizes, after: Sizes) -> float:
        """Expected cost of a cut: a quadratic in its share, because cuts hurt little at first."""
        return self.weight * (1 - self.size(after) / self.size(before)) ** 2

    # What it is a part of -----------------------------------------------------------------------

    def shares(self, family: Family, sizes: Sizes) -> Shares:
        """What would be gone without it."""
        gone = self.resized(sizes, 0)
        whole, left = (
            (num_parameters(family, s), cached_numbers(family, s), num_multiplications(family, s))
            for s in (sizes, gone)
        )
        return Shares(*(1 - b / a for a, b in zip(whole, left, strict=True)))

    def uneven(self, after: Sizes, devices: int) -> list[str]:
        """What of it does not split evenly over devices that share every matrix."""
        return []

    def torn(self, after: Sizes, group: int, devices: int) -> list[str]:
        """Rows that end inside a group of weights with one scale, once devices share them."""
        return []

    # config.json and the narrowing --------------------------------------------------------------

    def config(
        self, config: Mapping[str, Any], before: Sizes, after: Sizes, kept: Sequence[int]
    ) -> dict[str, Any]:
        """The numbers of config.json that it changes, where the original's layers `kept` stay."""
        return {key: getattr(after, key) for key in (*self.keys, self.name)}

    def layers(self, before: Sizes, after: Sizes) -> Sequence[int]:
        """The original's layers that stay, ascending."""
        return range(before.num_layers)

    @abstractmethod
    def story(self, record: Mapping[str, Any]) -> str:
        """How it was narrowed, for the card, from a manifest."""


class InnerAxis(Axis):
    """An axis of units inside a sublayer: neurons, KV groups."""

    space: ClassVar[str]
    """Of the writer behind them."""

    @abstractmethod
    def units(self, sizes: Sizes, space: str) -> Units:
        """How they are arranged, and chosen, in a space that the axis cuts."""

    @abstractmethod
    def method(self, options: Any) -> str:
        """Of `NarrowOptions`: which method chooses them."""


def steps(width: int) -> list[int]:
    """Steps of a width that kernels like, the coarsest first."""
    return [step for least, step in STEPS if width >= least]


def multiples(grid: int, width: int) -> list[int]:
    """Those up to a width that are searched."""
    least = -(-LEAST_SHARE * width // grid)
    return list(range(max(1, int(least)) * grid, width + 1, grid))


def off_grid(size: int, grain: int, *, of: str = "") -> str | None:
    """The words for a size that is no positive multiple of what it must be."""
    return None if size > 0 and size % grain == 0 else f"is not a positive multiple of {grain}{of}"


def off_group(name: str, width: int, grain: int) -> list[str]:
    """The words for rows that end inside a group of weights."""
    return [f"{name} {width} is no multiple of {grain}"] if width % grain else []
