"""What is asked of both models: lengths, batch, threads, and how long to measure.

Shapes: B sequences of a batch, L prompt tokens, N generated tokens after the first.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psutil

from dotexport.errors import UsageError
from dotexport.exports.target import Tokens

MOST_GROUPS = 15
MIN_GROUPS = 2
MOST = 1 << 30
BOUNDED = (
    *("prompt_length", "generation_length", "batch_size", "threads", "concurrency", "rounds"),
    *("min_iterations", "min_seconds", "min_warmups", "max_warmup_seconds", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape of request and how long to repeat it. The same for both models.

    Attributes:
        prompt_length: tokens of every prompt.
        generation_length: tokens generated after it, the first one included; no end-of-text.
        batch_size: sequences that run together.
        threads: CPU threads of the runtime; None: one per physical core this process may use.
        concurrency: processes of each model that answer at the same time, each one request after
            another (a closed loop); they share the threads.
        rounds: pairs of fresh processes, one after another, that share the measuring.
        min_iterations, min_seconds: measure each model until it has both.
        min_warmups: iterations before anything is kept; more until times are stable.
        max_warmup_seconds: a slow model stops warming up here, after two iterations at least.
        seed: of the token ids and of the bootstrap.
    """

    prompt_length: int = 128
    generation_length: int = 64
    batch_size: int = 1
    threads: int | None = None
    concurrency: int = 1
    rounds: int = 8
    min_iterations: int = 30
    min_seconds: float = 10.0
    min_warmups: int = 10
    max_warmup_seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(1, prompt_length=self.prompt_length, batch_size=self.batch_size)
        # Two tokens: with one there is no time per output token to speak of.
        _at_least(2, generation_length=self.generation_length, min_iterations=self.min_iterations)
        _at_least(0, min_seconds=self.min_seconds, min_warmups=self.min_warmups, seed=self.seed)
        _at_least(0, max_warmup_seconds=self.max_warmup_seconds)
        _at_least(1, concurrency=self.concurrency, rounds=self.rounds)
        _at_most(MOST, **{name: getattr(self, name) for name in BOUNDED})
        if self.threads is not None:
            # A process has one thread at least.
            _at_least(self.concurrency, threads=self.threads)

    @property
    def groups_each_round(self) -> int:
        """A B B A groups of one round; of all, enough for an interval, few enough to stay cheap."""
        wanted = min(MOST_GROUPS, max(MIN_GROUPS, -(-self.min_iterations // 2)))
        return -(-wanted // self.rounds)

    def with_threads(self) -> Workload:
        """This workload with the number of threads spelled out."""
        return self if self.threads else replace(self, threads=usable_cores())

    @property
    def threads_each(self) -> int | None:
        """Of one process."""
        return self.threads and self.threads // self.concurrency

    def tokens(self, vocabulary: int) -> tuple[Tokens, Tokens]:
        """prompt_BL and continuation_NB: seeded random ids below `vocabulary`."""
        rng = np.random.default_rng(self.seed)
        prompt_BL = rng.integers(vocabulary, size=(self.batch_size, self.prompt_length))
        shape = (self.generation_length - 1, self.batch_size)
        return prompt_BL, rng.integers(vocabulary, size=shape)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _at_least(minimum: int, **values: float) -> None:
    for name, value in values.items():
        if not value >= minimum:
            raise UsageError(f"{name} is {value}; expected at least {minimum}")


def _at_most(maximum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value > maximum:
            raise UsageError(f"{name} is {value}; expected at most {maximum:,}")


def usable_cores() -> int:
    """Physical cores, or fewer where the process is bound to fewer CPUs."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))
