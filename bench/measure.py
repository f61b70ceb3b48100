"""The bench verb: two models, fresh processes, taking turns on one machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.target import Target, find_target, lacking
from dotexport.storage import manifest
from dotexport.storage.files import write_json

from .device import environment
from .result import BenchResult
from .runner import Progress, Setting, measure
from .subject import Subject, choose_precision, find_subject
from .sweeps import Sweep
from .workload import Workload

REPORT = Path("reports/bench.json")


def bench(
    candidate: Path,
    baseline: Path,
    target: str = "ort-cpu",
    *,
    precision: str | None = None,
    workload: Workload | None = None,
    runtime: Mapping[str, Any] | None = None,
    roofline: bool = True,
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
        runtime: options of the target: for `hf`, device, dtype and compiled; for `gguf`,
            llama_cpp, the folder of llama.cpp to run it in.
        roofline: measure bandwidth and matrix rate of the device as well, before and after.
        out: file of the report; None: reports/bench.json in the candidate, if it is an output.
        progress: called between measurements.

    Raises:
        UsageError: a folder, precision or option that cannot serve.
        UnsupportedModelError: the target cannot hold one of the models.
        RuntimeMissingError: the runtime is not installed, or runs them on different providers.
        DotexportError: a measuring process died; the message holds its last words.
    """
    setting = _setting(target, precision, runtime, roofline, candidate, baseline)
    (result,) = _compare(candidate, baseline, setting, [workload or Workload()], progress)
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
    runtime: Mapping[str, Any] | None = None,
    roofline: bool = False,
    planted_slowdown: float = 0.0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """A against A: one artifact as both candidate and baseline.

    On a machine fit for measuring the interval holds 1 (`noise_verdict` says PASS), and its width
    says how small a difference can be seen there.

    Args:
        planted_slowdown: share of its time by which the candidate takes longer in each step, to
            see whether the bench finds it.
    """
    setting = _setting(target, precision, runtime, roofline, model, model)
    setting = replace(setting, planted_slowdown=planted_slowdown)
    (result,) = _compare(model, model, setting, [workload or Workload()], progress)
    if out is not None:
        write_json(out, result.as_dict())
    return result


def sweep(
    candidate: Path,
    baseline: Path | None,
    target: str = "ort-cpu",
    *,
    workloads: Sequence[Workload],
    precision: str | None = None,
    runtime: Mapping[str, Any] | None = None,
    roofline: bool = True,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """`bench` for several workloads, one after another; without a baseline, A against A.

    What has to be exported is exported once. The report is one document.
    """
    other = candidate if baseline is None else baseline
    setting = _setting(target, precision, runtime, roofline, candidate, other)
    result = Sweep(tuple(_compare(candidate, other, setting, workloads, progress)))
    if out is not None:
        write_json(out, result.as_dict())
    return result


def _setting(
    target: str,
    precision: str | None,
    runtime: Mapping[str, Any] | None,
    roofline: bool,
    *folders: Path,
) -> Setting:
    adapter = _ready(target)
    options = {name: str(v) if isinstance(v, Path) else v for name, v in (runtime or {}).items()}
    check_options(adapter, options)
    precision = choose_precision(adapter, precision, *folders)
    return Setting(adapter, precision, options, roofline)


def check_options(target: Target, runtime: Mapping[str, Any]) -> None:
    """Refuse options that the target has not, or that it refuses itself.

    Raises:
        UsageError: it has no such option.
        RuntimeMissingError: an option names a runtime that is not there.
    """
    takes = getattr(target, "run_options", ())
    if unknown := [name for name in runtime if name not in takes]:
        raise UsageError(
            f"target {target.name} has no {', '.join(unknown)} to choose; hf has device, dtype and "
            "compiled, gguf has llama_cpp, other targets have a name or a precision for each"
        )
    if check := getattr(target, "check_options", None):
        check(runtime)


def _compare(
    candidate: Path,
    baseline: Path,
    setting: Setting,
    workloads: Sequence[Workload],
    progress: Progress | None,
) -> Iterator[BenchResult]:
    progress = progress or _silent
    asked = [workload.with_threads() for workload in workloads]
    machines = [environment(workload) for workload in asked]  # before an export raises the load
    with _subjects(candidate, baseline, setting.target, setting.precision, progress) as subjects:
        for workload in asked:
            for subject in subjects:
                subject.check_fits(workload.prompt_length + workload.generation_length)
        for workload, machine in zip(asked, machines, strict=True):
            first, second, rates = measure(subjects, setting, workload, progress)
            yield BenchResult(
                target=setting.target.name,
                precision=setting.precision,
                workload=workload,
                environment=machine,
                candidate=first,
                baseline=second,
                runtime=dict(setting.runtime),
                rates=rates,
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


def _silent(stage: str, done: int, total: int) -> None:
    pass
