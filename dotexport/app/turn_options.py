"""How models are timed in turns: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.options import check_least, option


@dataclass(frozen=True, kw_only=True)
class TurnOptions:
    """Original and candidate are called in A B B A turns, in one process.

    Attributes:
        groups: turns, at least.
        seconds: for each model, at least.
    """

    threads: int = option(1, help="CPU threads.")
    groups: int = option(10, help="A B B A turns; 8 and more give a verdict.")
    seconds: float = option(5.0, help="Seconds for each model, at least.")
    seed: int = option(0, help="Same seed, same interval of the same timings.")

    def __post_init__(self) -> None:
        check_least(self, threads=1, groups=2, seconds=0)


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How many models are timed: all have their turn in every round.

    Attributes:
        seconds: for each model, over all rounds, at least.
    """

    timed: bool = option(True, help="Measure speed, too.", words=("--times/--no-times",))
    threads: int = option(1, help="CPU threads.")
    rounds: int = option(3, help="Turns of each artifact.")
    seconds: float = option(3.0, help="Seconds for each artifact, at least.")

    def __post_init__(self) -> None:
        check_least(self, threads=1, rounds=1, seconds=0)
