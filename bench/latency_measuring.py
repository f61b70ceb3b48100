"""The latency verb: time by size of one model on this device, in the runtime that will run it.

For every size a checkpoint with random weights goes through the target's own door (`problems`,
`write`, `open`) and takes turns with the original's sizes, A B B A, each in a process of its own.
A deep model is measured with fewer layers, at two depths, and the rest is a line in the number of
layers. A few sizes that are no part of the table then say how far it is off.

Shapes: G groups (one A B B A each), S samples of one model in a group.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dotexport.axes.carrying import planned_config
from dotexport.axes.plan import Plan, read_model
from dotexport.errors import SizeError, UnsupportedModelError, UsageError
from dotexport.exports.target import Target, find_target
from dotexport.exports.verifying import require_runtime
from dotexport.models.checkpoint import COMPANIONS, read_config
from dotexport.sizes.latency_options import LatencyOptions
from dotexport.sizes.latency_table import (
    METRICS,
    SCHEMA,
    describe,
    device,
    key_of,
    key_of_row,
    runtime_versions,
    times_of,
)
from dotexport.storage import manifest

from .device import one_cpu_per_core
from .latency_sizes import (
    Depth,
    depth_of,
    otherwise_uncut,
    shallow_config,
    strangers_of,
    table_sizes,
    workload_of,
)
from .process import Worker
from .result import Sample
from .runner import Progress
from .stand_in import write_stand_in
from .statistics import compare
from .subject import choose_precision

BLOCK_SECONDS = 0.1  # of one model at a stretch; shorter ones measure how it wakes up
WHOLE_BYTES = 2_000_000_000  # a model up to this size is held against its table with all layers


def measure_table(
    model: Path,
    options: LatencyOptions | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure a table; its keys are described in docs/latency.md.

    Args:
        model: folder with config.json and a tokenizer; weights are not read.

    Raises:
        UsageError: options, or sequences longer than the model's context.
        SizeError: there are no other sizes to measure.
        UnsupportedModelError: no family table, or a model that the target cannot hold.
        RuntimeMissingError: the runtime is not installed.
        DotexportError: a measuring process died.
    """
    options = options or LatencyOptions()
    target = find_target(options.target)
    require_runtime(target)
    precision = choose_precision(target, options.precision)
    config = read_config(model)
    family, before = read_model(config)
    if before.mixture:
        raise UnsupportedModelError(
            f"times of a mixture of experts ({family.architecture}) hang on which experts a text "
            "goes to, and are not tabled; give a budget of --params or --size"
        )
    whole = Plan(family, before, before)
    _check_context(config, options)
    environment = manifest.environment()
    measuring = _Measuring(model, config, target, precision, options)
    depth = depth_of(whole, options)
    sizes = table_sizes(whole, options)
    if len(sizes) < 2:
        raise SizeError(
            f"no legal size of {model} but its own is above {options.least:g} of it; give "
            "a smaller --least"
        )
    uncut = [p for p in sizes if otherwise_uncut(p)]
    strangers = strangers_of(whole, sizes, options)
    total = len(sizes) + (len(uncut) if depth.shallow else 0)
    steps = _Steps(progress, total + 2 + len(strangers))
    with measuring.beside(whole, depth.measured, steps) as beside:
        rows = [row for p in sizes if key_of(p.after) != key_of(before) for row in beside.rows(p)]
        if depth.shallow:
            rows += [row for p in uncut for row in beside.rows(p, depth.shallow)]
        original = beside.milliseconds()
    content = {
        "schema": SCHEMA,
        "model": describe(family.architecture, before),
        "target": target.name,
        "precision": precision,
        "threads": workload_of(options, 1).threads,
        "device": device() | {"libraries": runtime_versions(target.name)},
        "workload": {"prompt": options.prompt, "generate": options.generate},
        "options": asdict(options) | {"batches": list(options.batches)},
        "layers": asdict(depth),
        "skipped": measuring.skipped,
        "original": original,
        "rows": rows,
        "held_out": [],
        "environment": environment,
    }
    return content | _judged(content, measuring, whole, strangers, depth, steps)


def _check_context(config: Mapping[str, Any], options: LatencyOptions) -> None:
    context, asked = config.get("max_position_embeddings"), options.prompt + options.generate
    if context is not None and asked > context:
        raise UsageError(
            f"prompt and generation take {asked} tokens, and the model's context is {context}; "
            "ask for fewer"
        )


# Measuring --------------------------------------------------------------------------------------


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def next(self, stage: str) -> None:
        self.progress(f"measuring sizes: {stage}", self.done, self.total)
        self.done += 1


@dataclass
class _Loaded:
    """A process with one artifact and one workload, warm."""

    worker: Worker
    on_gpu: bool
    iteration_s: float


@dataclass(frozen=True)
class _Measuring:
    """What all measurements of a table share."""

    model: Path
    config: Mapping[str, Any]
    target: Target
    precision: str
    options: LatencyOptions
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def beside(self, whole: Plan, layers: int, steps: _Steps) -> Iterator[_Beside]:
        """The original's sizes with so many layers, exported once."""
        steps.next(f"the original with {layers} layers")
        with ExitStack() as stack:
            folder = stack.enter_context(self._artifact(whole, layers))
            if isinstance(folder, list):
                raise UnsupportedModelError(
                    f"{self.model} cannot be measured with {self.target.name} ({self.precision}): "
                    + "; ".join(folder)
                )
            yield _Beside(self, layers, folder, steps)

    @contextmanager
    def _artifact(self, plan: Plan, layers: int) -> Iterator[Path | list[str]]:
        """An artifact of these sizes with random weights; or all that the target has against it."""
        with tempfile.TemporaryDirectory(prefix="dotexport-latency-") as scratch:
            stand_in, folder = Path(scratch) / "model", Path(scratch) / "artifact"
            stand_in.mkdir()
            folder.mkdir()
            config = shallow_config(planned_config(self.config, plan), layers)
            checkpoint = write_stand_in(stand_in, config, self._companions())
            if problems := self.target.problems(checkpoint, self.precision):
                yield problems
                return
            self.target.write(checkpoint, folder, self.precision)
            yield folder

    def _companions(self) -> list[Path]:
        return sorted({f for glob in COMPANIONS for f in self.model.glob(glob) if f.is_file()})

    def _loaded(self, name: str, folder: Path, batch: int, stack: ExitStack) -> _Loaded:
        workload = workload_of(self.options, batch)
        worker = stack.enter_context(Worker(name, threads=workload.threads))
        loaded = worker.ask(
            "load", target=self.target.name, folder=str(folder), workload=workload.as_dict()
        )
        warmed = worker.ask("warm_up", vocabulary=loaded["vocabulary"])
        on_gpu = "cuda" in " ".join(loaded["providers"]).lower()
        return _Loaded(worker, on_gpu, warmed["iteration_s"])


@dataclass(frozen=True)
class _Beside:
    """Measures sizes in turns with the original: in every round, a fresh process of each.

    One process of the original for all sizes would be faster or slower than usual by where its
    memory happens to lie, and every promise too high or too low by the same.
    """

    measuring: _Measuring
    layers: int
    original: Path
    steps: _Steps
    seen: list[tuple[int, list[list[Sample]]]] = field(default_factory=list)

    def rows(self, plan: Plan, layers: int | None = None) -> list[dict[str, Any]]:
        """One row for each batch; none where the target cannot hold these sizes."""
        self.steps.next(plan.in_words())
        row = plan.sizes() | {"layers": layers or self.layers}
        with self.measuring._artifact(plan, row["layers"]) as folder:
            if isinstance(folder, list):
                self.measuring.skipped.append(row | {"problems": folder})
                return []
            return [row | self._row(folder, batch) for batch in self.measuring.options.batches]

    def _row(self, folder: Path, batch: int) -> dict[str, Any]:
        threads = workload_of(self.measuring.options, batch).threads or 0
        mine, theirs, iterations = list[list[Sample]](), list[list[Sample]](), 0
        for number in range(self.measuring.options.rounds):
            with ExitStack() as stack:
                pair = (
                    self.measuring._loaded("a size", folder, batch, stack),
                    self.measuring._loaded("the original", self.original, batch, stack),
                )
                # As many in every round: they are compared group by group.
                iterations = iterations or _iterations(pair)
                one, other = _take_turns(pair, number, iterations, threads)
            mine.append(one)
            theirs.append(other)
        self.seen.append((batch, theirs))
        figures = {metric: _compared(mine, theirs, metric) for metric in METRICS}
        return {"batch": batch, **figures}

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Medians of the original, over every turn it took."""
        return {
            str(batch): {
                f"{metric}_ms": float(
                    np.median([t for b, s in self.seen if b == batch for t in _times(s, metric)])
                )
                for metric in METRICS
            }
            for batch in self.measuring.options.batches
        }


def _iterations(pair: tuple[_Loaded, _Loaded]) -> int:
    pace = min(one.iteration_s for one in pair)
    return max(1, math.ceil(BLOCK_SECONDS / max(pace, 1e-9)))


def _take_turns(
    pair: tuple[_Loaded, _Loaded], number: int, iterations: int, threads: int
) -> tuple[list[Sample], list[Sample]]:
    """A B B A, in every other round B A A B: samples of both."""
    kept: tuple[list[Sample], list[Sample]] = ([], [])
    cpus = None if pair[0].on_gpu else _processors(number, threads)
    for who in (0, 1, 1, 0) if number % 2 == 0 else (1, 0, 0, 1):
        answer = pair[who].worker.ask("measure", iterations=iterations, cpus=cpus)
        for first, *gaps in answer["samples_ns"]:
            kept[who].append(Sample(number, first / 1e6, tuple(gap / 1e6 for gap in gaps)))
    return kept


def _processors(group: int, threads: int) -> list[int] | None:
    """Where both run in this group, as bench has it: left alone, they settle on different cores."""
    cpus = one_cpu_per_core()
    if not 0 < threads < len(cpus):
        return None
    return [cpus[(group * threads + n) % len(cpus)] for n in range(threads)]


def _compared(mine: list[list[Sample]], theirs: list[list[Sample]], metric: str) -> dict[str, Any]:
    """Ratio of medians with its interval, and all that was timed, in milliseconds by group."""
    ours_GS, other_GS = (_by_group(samples, metric) for samples in (mine, theirs))
    found = compare(ours_GS, other_GS, rounds=len(ours_GS))
    return {
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
        "samples_ms": [[round(t, 4) for t in group] for group in ours_GS],
        "original_samples_ms": [[round(t, 4) for t in group] for group in other_GS],
    }


def _by_group(samples: list[list[Sample]], metric: str) -> list[list[float]]:
    return [[s.tpot_ms if metric == "decode" else s.ttft_ms for s in group] for group in samples]


def _times(samples: list[list[Sample]], metric: str) -> list[float]:
    return [time for group in _by_group(samples, metric) for time in group]


# Judging ----------------------------------------------------------------------------------------


def _judged(
    content: dict[str, Any],
    measuring: _Measuring,
    whole: Plan,
    strangers: Sequence[Plan],
    depth: Depth,
    steps: _Steps,
) -> dict[str, Any]:
    """Sizes that the table does not hold, read from it and measured, and the original's times.

    All layers are measured where the model is small enough for that.
    """
    affordable = 4 * whole.parameters_before <= WHOLE_BYTES
    layers = depth.model if affordable else depth.measured
    if not strangers and layers == depth.measured:
        return {"original": _scaled(content, depth)}
    read_at = content | {"layers": {**content["layers"], "model": layers}}
    with measuring.beside(whole, layers, steps) as beside:
        measured = [row for p in strangers for row in beside.rows(p)]
        original = beside.milliseconds() if measured else _scaled(content, depth)
    for row in measured:
        for metric in METRICS:
            predicted = times_of(read_at, metric, row["batch"]).ratio(key_of_row(row))
            row[metric] |= {"predicted": predicted, "measured": row[metric]["ratio"]}
    return {"held_out": measured, "original": original if affordable else _scaled(content, depth)}


def _scaled(content: Mapping[str, Any], depth: Depth) -> Any:
    """Milliseconds of the original with all its layers, from those of the measured depth."""
    return {
        batch: {
            f"{metric}_ms": figures[f"{metric}_ms"]
            * times_of(content, metric, int(batch)).deepened()
            for metric in METRICS
        }
        for batch, figures in content["original"].items()
    }
