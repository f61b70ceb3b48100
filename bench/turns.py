"""Calls of two models in turns (A B B A) in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dotexport.app.turn_options import TurnOptions

from .statistics import compare

WARMUPS = 3

Call = Callable[[], object]
Progress = Callable[[str, int, int], None]


def in_turns(
    calls: Sequence[Call],
    options: TurnOptions,
    name: str,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Milliseconds of baseline and candidate, their ratio with its interval, and the verdict.

    Args:
        calls: of the baseline, and of the candidate.
    """
    for call in calls:
        for _ in range(WARMUPS):
            call()
    timings: list[list[list[float]]] = [[], []]
    started, done = time.perf_counter(), 0
    while done < options.groups or time.perf_counter() - started < 2 * options.seconds:
        taken: list[list[float]] = [[], []]
        for which in (0, 1, 1, 0):
            begun = time.perf_counter()
            calls[which]()
            taken[which].append(time.perf_counter() - begun)
        for all_taken, some in zip(timings, taken, strict=True):
            all_taken.append(some)
        done += 1
        progress(f"timing {name}", min(done, options.groups), options.groups)
    found = compare(timings[1], timings[0], seed=options.seed)
    return {
        "baseline_ms": 1e3 * float(np.median(timings[0])),
        "candidate_ms": 1e3 * float(np.median(timings[1])),
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
        "groups": found.groups,
        "samples_ms": [[[round(1e3 * t, 4) for t in g] for g in rows] for rows in timings],
    }


def order_of(count: int, number: int, rounds: int) -> list[int]:
    """In which order so many have their turn in a round: each begins with another one, every
    second goes backwards.

    >>> [order_of(3, number, 3) for number in range(3)]
    [[0, 1, 2], [0, 2, 1], [2, 0, 1]]
    """
    first = number * count // rounds
    order = [*range(first, count), *range(first)]
    return order if number % 2 == 0 else order[::-1]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Threads of torch while something is timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
