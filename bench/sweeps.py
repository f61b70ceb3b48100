"""Several workloads of the same two models, in one document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage.schema import validated

from .result import AGAIN, BenchResult

if TYPE_CHECKING:  # a measuring process imports this package, and recipes need torch
    from dotexport.app.steps import BenchStep

SCHEMA = "dotexport.sweep/1"
NOISE_SHARE = 0.9  # of A-against-A runs whose interval has to hold 1


@dataclass(frozen=True)
class Sweep:
    """Results in the order in which they were measured."""

    results: tuple[BenchResult, ...]

    @property
    def noise_verdict(self) -> str | None:
        """PASS or FAIL over all runs of a model against itself; None where two were compared."""
        if any(result.noise_verdict is None for result in self.results):
            return None
        held = sum(
            r.comparisons["e2el"].low <= 1 <= r.comparisons["e2el"].high for r in self.results
        )
        needed = math.ceil(NOISE_SHARE * len(self.results))
        word = "PASS" if held >= needed else "FAIL"
        return (
            f"{word}: the 95 % interval of A against A holds 1 in {held} of {len(self.results)} "
            f"runs; at least {needed} are needed"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "noise_check": self.noise_verdict,
            "results": [result.as_dict() for result in self.results],
        }

    def headline(self) -> dict[str, Any]:
        """Without raw samples, small enough for one line."""
        return self.as_dict() | {"results": [result.headline() for result in self.results]}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Sweep:
        """The sweep that `as_dict` described.

        Raises:
            UsageError: another kind of report.
        """
        if stored.get("schema") != SCHEMA:
            raise UsageError(
                f"not a sweep: schema is {stored.get('schema')!r}, expected {SCHEMA!r}"
            )
        results = swept(stored, "the sweep")
        return cls(tuple(BenchResult.from_dict(result) for result in results))


def swept(stored: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The results of a stored sweep, each still to be read.

    Raises:
        UsageError: it has none.
        CheckpointError: they are no list of objects.
    """
    found = stored.get("results")
    if not found:
        raise UsageError(f"{where} is a sweep without results; measure again")
    return validated(list[dict[str, Any]], found, where, error=CheckpointError, advice=AGAIN)


def steps_of(
    step: BenchStep, shape: Mapping[str, str | None], *, runs: int = 1, noise: bool = False
) -> list[BenchStep]:
    """A step for every combination of the values that flags list, the last changing fastest.

    Raises:
        UsageError: a value that is no whole number, or several runs of what is no noise check.
    """
    if runs < 1 or (runs > 1 and not noise):
        raise UsageError(f"--runs {runs}: expected 1 or more, and several only with --noise-check")
    given = {name: parse_values(f"--{name}", text) for name, text in shape.items() if text}
    steps = [step]
    for name, values in given.items():
        steps = [_with(one, name, value) for one in steps for value in values]
    return steps * runs


def _with(step: BenchStep, name: str, value: Any) -> BenchStep:
    return replace(step, **{name: value})


def parse_values(flag: str, text: str) -> list[int]:
    """Whole numbers from `1,4,8`.

    Raises:
        UsageError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{flag} {text!r} cannot be read; expected a whole number, or several as in 1,4,8"
        ) from error
