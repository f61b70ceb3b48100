"""The bench verb: two models, a process each, taking turns on one machine."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dotexport import manifest
from dotexport.adapter import Target, find_target, lacking
from dotexport.errors import RuntimeMissingError
from dotexport.output import write_json

from .process import Worker
from .result import BenchResult, Measurement, Sample
from .subject import Subject, choose_precision, find_subject
from .workload import Workload

REPORT = Path("reports/bench.json")

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many percent of the measuring are; never while timing."""


def bench(
    candidate: Path,
    baseline: Path,
    target: str = "ort-cpu",
    *,
    precision: str | None = None,
    workload: Workload | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure two models on the same target, precision and workload, taking turns.

    Args:
        candidate, baseline: an output of dotexport, a model folder, or an artifact of the target.
            What has no artifact yet is exported into a temporary folder first.
        target: name of the runtime.
        precision: of both artifacts; None: that of the candidate's artifact, or the default.
        workload: None: one sequence, 128 tokens in, 64 out.
        out: file of the report; None: reports/bench.json in the candidate, if it is an output.
        progress: called between measurements.

    Raises:
        UsageError: a folder or precision that cannot serve.
        UnsupportedModelError: the target cannot hold one of the models.
        RuntimeMissingError: the runtime is not installed, or runs them on different providers.
        DotexportError: a measuring process died; the message holds its last words.
    """
    result = _compare(candidate, baseline, target, precision, workload, progress or _silent)
    if out is None and manifest.is_output(candidate):
        out = candidate / REPORT
    if out is not None:
        write_json(out, result.as_dict())
    return result


def noise_check(
    model: Path,
    target: str = "ort-cpu",
    *,
    precision: str | None = None,
    workload: Workload | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """A against A: one artifact as both candidate and baseline.

    On a machine fit for measuring the verdict is "no measurable gain"; any other verdict, and
    the width of the interval, say how far figures taken on this machine can be trusted.
    """
    result = _compare(model, model, target, precision, workload, progress or _silent)
    if out is not None:
        write_json(out, result.as_dict())
    return result


def _compare(
    candidate: Path,
    baseline: Path,
    target: str,
    precision: str | None,
    workload: Workload | None,
    progress: Progress,
) -> BenchResult:
    workload = (workload or Workload()).with_threads()
    adapter = _ready(target)
    precision = choose_precision(adapter, precision, candidate, baseline)
    environment = _environment(workload)  # before an export raises the load average
    with _subjects(candidate, baseline, adapter, precision, progress) as subjects:
        for subject in subjects:
            subject.check_fits(workload.prompt_length + workload.generation_length)
        measured = _measure(subjects, target, workload, progress)
    return BenchResult(
        target=target,
        precision=precision,
        workload=workload,
        environment=environment,
        candidate=measured[0],
        baseline=measured[1],
    )


def _ready(target: str) -> Target:
    adapter = find_target(target)
    missing = adapter.missing()
    if missing:
        raise RuntimeMissingError(f"target {target} cannot run here: install {', '.join(missing)}")
    if absent := lacking(adapter):
        raise RuntimeMissingError(f"target {target} cannot run here: it needs {'; '.join(absent)}")
    return adapter


@contextmanager
def _subjects(
    candidate: Path, baseline: Path, target: Target, precision: str, progress: Progress
) -> Iterator[tuple[Subject, Subject]]:
    with tempfile.TemporaryDirectory(prefix="dotexport-bench-") as scratch:
        progress("preparing the candidate", 0, 100)
        first = find_subject("candidate", candidate, target, precision, Path(scratch))
        if candidate.resolve() == baseline.resolve():
            yield first, replace(first, name="baseline")
            return
        progress("preparing the baseline", 0, 100)
        second = find_subject("baseline", baseline, target, precision, Path(scratch))
        yield first, second


def _environment(workload: Workload) -> dict[str, Any]:
    """The machine as it is before anything runs."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        **manifest.environment(),
        "threads": workload.threads,
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


@dataclass
class _Runner:
    """One model, its process, and what came out of it so far."""

    subject: Subject
    worker: Worker
    loaded: dict[str, Any]
    warmed: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def run(self, group: int, iterations: int) -> None:
        answer = self.worker.ask("measure", iterations=iterations)
        for first, *gaps in answer["samples_ns"]:
            self.samples.append(Sample(group, first / 1e6, tuple(gap / 1e6 for gap in gaps)))

    @property
    def seconds(self) -> float:
        return sum(sample.e2el_ms for sample in self.samples) / 1e3

    def measurement(self) -> Measurement:
        return Measurement(
            name=self.subject.name,
            source=str(self.subject.source),
            artifact=str(self.subject.artifact),
            artifact_bytes=self.subject.num_bytes,
            num_parameters=self.subject.num_parameters,
            vocabulary=self.loaded["vocabulary"],
            import_s=self.loaded["import_s"],
            load_s=self.loaded["load_s"],
            first_run_ms=self.loaded["first_run_ms"],
            warmups=self.warmed["warmups"],
            warmed_up=self.warmed["stable"],
            harness_overhead_us=self.loaded["harness_overhead_us"],
            rss_before_load_bytes=self.loaded["rss_before_load_bytes"],
            peak_rss_bytes=self.worker.ask("memory")["peak_rss_bytes"],
            providers=tuple(self.loaded["providers"]),
            samples=tuple(self.samples),
        )


def _measure(
    subjects: tuple[Subject, Subject], target: str, workload: Workload, progress: Progress
) -> tuple[Measurement, Measurement]:
    with ExitStack() as stack:
        first, second = (
            _loaded(subject, target, workload, progress, stack) for subject in subjects
        )
        _check_same_providers(first, second)
        vocabulary = min(first.loaded["vocabulary"], second.loaded["vocabulary"])
        for runner in (first, second):
            progress(f"warming up the {runner.subject.name}", 0, 100)
            runner.warmed = runner.worker.ask("warm_up", vocabulary=vocabulary)
        _take_turns(first, second, workload, progress)
        return first.measurement(), second.measurement()


def _loaded(
    subject: Subject, target: str, workload: Workload, progress: Progress, stack: ExitStack
) -> _Runner:
    progress(f"loading the {subject.name}", 0, 100)
    label = f"{subject.name} {subject.source}"
    worker = stack.enter_context(Worker(label, threads=workload.threads))
    loaded = worker.ask(
        "load", target=target, folder=str(subject.artifact), workload=workload.as_dict()
    )
    return _Runner(subject, worker, loaded)


def _check_same_providers(first: _Runner, second: _Runner) -> None:
    ours, theirs = first.loaded["providers"], second.loaded["providers"]
    if ours != theirs:
        raise RuntimeMissingError(
            f"the candidate runs on {ours} and the baseline on {theirs}; expected the same: one "
            "of them fell back, so the comparison would mean nothing"
        )


def _take_turns(first: _Runner, second: _Runner, workload: Workload, progress: Progress) -> None:
    """A B B A, then B A A B, until both have their iterations and their seconds.

    In each group both models have the same mean position in time; starting each second group
    with the other model makes neither always the one that follows a pause.
    """
    iterations = _block_size(workload, min(r.warmed["iteration_s"] for r in (first, second)))
    group = 0
    while (done := _share_done(first, second, group, workload)) < 1:
        progress("measuring", int(100 * done), 100)
        outer, inner = (first, second) if group % 2 == 0 else (second, first)
        for runner in (outer, inner, inner, outer):
            runner.run(group, iterations)
        group += 1
    progress("measured", 100, 100)


def _block_size(workload: Workload, iteration_s: float) -> int:
    """Iterations in a block, so that min_groups groups are about enough: two blocks in each."""
    needed = max(workload.min_iterations, workload.min_seconds / max(iteration_s, 1e-9))
    return max(1, math.ceil(needed / (2 * workload.min_groups)))


def _share_done(first: _Runner, second: _Runner, groups: int, workload: Workload) -> float:
    shares = [groups / workload.min_groups]
    for runner in (first, second):
        shares.append(len(runner.samples) / workload.min_iterations)
        if workload.min_seconds > 0:
            shares.append(runner.seconds / workload.min_seconds)
    return min(shares)


def _silent(stage: str, done: int, total: int) -> None:
    pass
