"""Steps of the bench verb: what a recipe and a command line ask of it, and where it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dotexport.app.door import benches
from dotexport.app.rounding_text import text_of
from dotexport.app.steps import BenchStep, FrontierStep, ServedStep
from dotexport.errors import UsageError
from dotexport.models.finding import find_model
from dotexport.narrowing.norm_statistics import Progress
from dotexport.outputs import card
from dotexport.storage import manifest


def bench_into(
    candidate: Path,
    baseline: Path | None,
    step: BenchStep,
    *,
    report: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """Bench a model beside the original; without one, beside itself (the noise check).

    An output of dotexport keeps the report in OUT/reports and the headline in its manifest.
    """
    asked = _asked(step, progress) | {"workload": workload_of(step)}
    if baseline is None:
        return benches().noise_check(candidate, step.target, out=report, **asked)
    if report is None and manifest.is_output(candidate):
        report = candidate / bench_report(step)
    check_gate(step)
    result = benches().bench(candidate, baseline, step.target, out=report, **asked)
    if manifest.is_output(candidate):
        manifest.merge(candidate, bench={bench_name(step): result.headline()})
        card.write(candidate)
    return result


def sweep_into(
    candidate: Path,
    baseline: Path | None,
    steps: Sequence[BenchStep],
    *,
    report: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """`bench_into` for steps that differ in their workload alone; one report, no manifest entry."""
    first = steps[0]
    check_gate(first)
    if report is None and baseline is not None and manifest.is_output(candidate):
        report = candidate / "reports" / f"bench-{bench_name(first)}-sweep.json"
    workloads = [workload_of(step) for step in steps]
    asked = _asked(first, progress)
    return benches().sweep(
        candidate, baseline, first.target, workloads=workloads, out=report, **asked
    )


def bench_vllm_into(
    candidate: Path,
    baseline: Path,
    served: ServedStep,
    step: BenchStep,
    shape: Mapping[str, str | None],
    *,
    report: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """Run one of vLLM's benchmarks beside the original; an output keeps report and headline.

    Args:
        shape: of the requests, as flags say it: vLLM's benchmarks take one number and no sweep.

    Raises:
        UsageError, RuntimeMissingError, DotexportError: as `bench_served`.
    """
    numbers = {name: _one(name, text) for name, text in shape.items() if text is not None}
    options = benches().ServedOptions(
        kind=served.kind,
        iterations=step.min_iterations,
        requests=served.requests,
        warmups=step.warmups,
        rounds=served.rounds,
        request_rate=served.request_rate,
        precision=step.precision,
        arguments=benches().parse_arguments(served.arguments),
        seed=step.seed,
        **numbers,
    )
    if report is None and manifest.is_output(candidate):
        report = candidate / "reports" / f"bench-vllm-{options.kind}.json"
    result = benches().bench_served(
        candidate, baseline, served.python, options, out=report, progress=progress
    )
    if manifest.is_output(candidate):
        manifest.merge(candidate, served={options.kind: result.headline()})
        card.write(candidate)
    return result


def frontier_into(
    original: Path,
    narrowed: Sequence[Path],
    step: FrontierStep,
    *,
    out: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """The original and what was narrowed from it at equal bytes; with `out`, kept there.

    Raises:
        UsageError, SizeError, RuntimeMissingError, DotexportError: as `frontier` of the bench.
    """
    workload = benches().Workload(
        prompt_length=step.prompt,
        generation_length=step.generate,
        threads=step.threads,
        rounds=step.rounds,
        min_iterations=step.min_iterations,
        min_seconds=step.min_seconds,
        min_warmups=3,
        max_warmup_seconds=5.0,
        seed=step.seed,
    )
    found = benches().frontier(
        original,
        narrowed,
        step.target or ("ort-cpu",),
        step.texts(),
        rivals=[find_model(name) for name in step.rival],
        out=out,
        workload=workload if step.timed else None,
        runtime={"llama_cpp": str(Path(step.llama_cpp).resolve())} if step.llama_cpp else {},
        rounded_for=text_of(step.rounding, progress),
        progress=progress,
    )
    if out is not None:
        benches().write_frontier(found, out)
    return found


def judge_bench(step: BenchStep, result: Any, candidate: Path) -> Any:
    """Hold the gate of a step against what it measured, and the quality that `candidate` has."""
    limits = benches().read_gate(Path(step.gate)) if step.gate else []
    results = getattr(result, "results", (result,))  # of a sweep, or the one
    return benches().judge_results(results, limits, candidate / bench_report(step))


def check_gate(step: BenchStep) -> None:
    """Refuse a gate that cannot be read before anything is measured."""
    if step.gate is not None:
        benches().read_gate(Path(step.gate))


def bench_report(step: BenchStep) -> Path:
    return Path("reports", f"bench-{bench_name(step)}.json")


def _asked(step: BenchStep, progress: Progress) -> dict[str, Any]:
    return {
        "precision": step.precision,
        "runtime": step.runtime(),
        "roofline": step.roofline,
        "progress": progress,
    }


def _one(name: str, text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"--target vllm takes one {name} at a time, not {text!r}")
    return int(text)


def workload_of(step: BenchStep) -> Any:
    shape = {
        "prompt_length": step.prompt,
        "generation_length": step.generate,
        "batch_size": step.batch,
        "threads": step.threads,
        "concurrency": step.concurrency,
    }
    return benches().Workload(
        **(benches().find_preset(step.preset) if step.preset else {})
        | {name: value for name, value in shape.items() if value is not None},
        rounds=step.rounds,
        min_iterations=step.min_iterations,
        min_seconds=step.min_seconds,
        min_warmups=step.warmups,
        seed=step.seed,
    )


def bench_name(step: BenchStep) -> str:
    """Key of a bench in the manifest: target, precision and what else it ran as."""
    words = [spec_of(step).replace(":", "-"), *benches().options_in_words(step.runtime())]
    return "-".join(words).replace(":", "")


def spec_of(step: BenchStep) -> str:
    return f"{step.target}:{step.precision}" if step.precision else step.target
