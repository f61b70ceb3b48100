"""What a budget of time promised, measured again on the model that came out of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dotexport.sizes.latency import Promise

from .measure import bench
from .result import BenchResult
from .runner import Progress
from .statistics import ENOUGH_GROUPS, Comparison
from .workload import Workload

REPORT = Path("reports/bench-latency.json")
ROUNDS = 5  # pairs of fresh processes: one is faster or slower by where its memory lies
METRICS = {"decode": "tpot", "prefill": "ttft"}


def measure_again(
    out: Path, original: Path, promised: Promise, progress: Progress | None = None
) -> dict[str, Any]:
    """Promise and measurement, for the manifest; the whole bench goes to OUT/reports.

    Narrowed and original model take turns on the runtime, precision, threads, lengths and batch of
    the promise, only as long as an interval needs.

    Raises:
        DotexportError: whatever `bench` raises.
    """
    workload = Workload(
        prompt_length=promised.prompt,
        generation_length=promised.generate,
        batch_size=promised.batch,
        threads=promised.threads,
        rounds=ROUNDS,
        min_iterations=2 * ENOUGH_GROUPS,
        min_seconds=2.0,
        min_warmups=5,
    )
    result = bench(
        out,
        original,
        promised.target,
        precision=promised.precision,
        workload=workload,
        roofline=False,
        out=out / REPORT,
        progress=progress,
    )
    return asdict(promised) | _measured(result, promised)


def _measured(result: BenchResult, promised: Promise) -> dict[str, Any]:
    metric = METRICS[promised.metric]
    found = result.comparisons[metric]
    return {
        "threads": result.workload.threads,
        "original_ms": result.baseline.summaries[metric].p50,
        "narrowed_ms": result.candidate.summaries[metric].p50,
        "measured": asdict(found),
        "verdict": verdict(found, promised.limit),
    }


def verdict(found: Comparison, limit: float) -> str:
    """Whether the budget was kept, as far as the interval can tell.

    >>> verdict(Comparison(0.83, 0.81, 0.85, groups=8), 0.8)
    'missed'
    """
    if found.high <= limit:
        return "kept"
    if found.low > limit:
        return "missed"
    return "kept within noise" if found.ratio <= limit else "missed within noise"
