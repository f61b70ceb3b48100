"""Speed of pipelines in ONNX Runtime: one step of the denoiser, and the whole pipeline, dense and
pruned in turns (A B B A) in this process.

Sessions of both lie in memory at once, with the same threads; a step is one call of the denoiser's
session on inputs that were recorded from the pipeline. `torch` measures the modules themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dotexport.app.turn_options import TurnOptions
from dotexport.diffusion import graphs, onnx_folder, pipeline_card, saving
from dotexport.diffusion.calibration import Progress
from dotexport.diffusion.sampling import component_of, load, sample
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import folder_bytes

from .turns import in_turns, torch_threads


@dataclass(frozen=True)
class Subject:
    """One pipeline, ready to be timed."""

    step: Callable[[], object]
    whole: Callable[[], object]
    num_bytes: int


def bench_pipeline(
    candidate: Path,
    baseline: Path,
    target: str,
    options: TurnOptions | None = None,
    *,
    batch: int = 1,
    steps: int = 4,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare an output with the original and record it in its manifest, card and reports."""
    options = options or TurnOptions()
    pipelines = [saving.pipeline_of(folder) for folder in (baseline, candidate)]
    for folder in pipelines:
        manifest.require_unchanged(folder)
    record: dict[str, Any] = {
        "target": target,
        "threads": options.threads,
        "batch": batch,
        "steps": steps,
    }
    with ExitStack() as stack:
        stack.enter_context(torch_threads(options.threads))
        subjects = [
            stack.enter_context(
                _subject(folder, home, target, batch, steps, options.threads, candidate)
            )
            for folder, home in zip(pipelines, (baseline, candidate), strict=True)
        ]
        for name in ("step", "whole"):
            calls = [getattr(subject, name) for subject in subjects]
            record[name] = in_turns(calls, options, name, progress)
    record["bytes"] = [subject.num_bytes for subject in subjects]
    _record(candidate, f"{target.replace(':', '-')}", record)
    return record


@contextmanager
def _subject(
    folder: Path, home: Path, target: str, batch: int, steps: int, threads: int, asked: Path
) -> Iterator[Subject]:
    """Both pipelines are called as the candidate's manifest says."""
    pipe, told = load(folder), manifest.read(asked)
    case = onnx_folder.cases(pipe, told)[0]
    prompts = tuple(case.prompts[n % len(case.prompts)] for n in range(batch))
    case = replace(case, prompts=prompts, options=replace(case.options, steps=steps, batch=batch))
    part = graphs.Part(component_of(pipe), component_of(pipe))
    recording = onnx_folder.record(pipe, case)[part.folder]

    def whole() -> object:
        return sample(pipe, prompts, 0, case.options)

    if target == "torch":
        model = getattr(pipe, part.component)

        def call() -> object:
            with torch.no_grad():
                return model(*recording.args, **recording.kwargs)

        yield Subject(call, whole, folder_bytes(folder / part.component))
        return
    with ExitStack() as stack:
        artifact = stack.enter_context(_artifact(pipe, folder, home, target, told))
        loaded = graphs.session(artifact / part.folder / graphs.GRAPH, threads=threads)
        fed = graphs.feed(loaded, recording.calls[0])
        stack.enter_context(graphs.in_place(pipe, artifact, threads=threads))
        size = folder_bytes(artifact / part.folder)
        yield Subject(lambda: loaded.run(None, fed), whole, size)


@contextmanager
def _artifact(
    pipe: Any, folder: Path, home: Path, target: str, told: dict[str, Any]
) -> Iterator[Path]:
    """The artifact of an output, or one made for the while."""
    precision = onnx_folder.parse_target(target)
    made = home / f"{onnx_folder.TARGET}-{precision}"
    if made.is_dir():
        manifest.require_unchanged(made)
        yield made
        return
    with tempfile.TemporaryDirectory() as scratch:
        tried = onnx_folder.cases(pipe, told)
        onnx_folder.write_graphs(pipe, folder, Path(scratch), tried, precision)
        yield Path(scratch)


def _record(out: Path, name: str, record: dict[str, Any]) -> None:
    write_json(out / "reports" / f"bench-{name}.json", record)
    made = manifest.read(out)
    headline = {
        f"{name} {what}, {record['threads']} threads": {
            key: value for key, value in record[what].items() if key != "samples_ms"
        }
        for what in ("step", "whole")
    }
    manifest.merge(out, bench=headline, bench_bytes={f"{name} denoiser": record["bytes"]})
    if "shrink" in made:
        pipeline_card.write(out)
