"""The run verb: shrink, export, verify, evaluate, bench, in one resumable chain.

Each step leaves its result in OUT as soon as it is whole, under the hash of the recipe; a run that
was killed goes on with the first step whose result is not there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dotexport import card, embedded, manifest
from dotexport.calibrate import token_windows
from dotexport.checkpoint import find_model
from dotexport.errors import UsageError
from dotexport.narrow import Progress
from dotexport.output import write_text
from dotexport.recipe import FILE, BenchStep, EvalStep, Recipe
from dotexport.shrinking import shrink


def run(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Run a recipe into `out` and return its manifest.

    Raises:
        UsageError: `out` holds something else, or was made by another recipe.
        DotexportError: whatever a step raises; what earlier steps made stays, and the same command
            goes on from there.
    """
    model = source_folder(recipe.model)
    identity = hashlib.sha256(recipe.dump().encode()).hexdigest()
    if not _resumable(out, identity) or overwrite:
        shrink(
            model,
            out,
            recipe.shrink.options(),
            overwrite=overwrite,
            device=device,
            progress=progress,
        )
        write_text(out / FILE, recipe.dump())
        manifest.update(out, recipe=identity)
    _export(recipe, out, progress)
    if recipe.eval and "quality" not in manifest.read(out):
        evaluate_into(out, model, recipe.eval, device=device, progress=progress)
    for step in recipe.bench:
        if bench_name(step) not in manifest.read(out).get("bench", {}):
            bench_into(out, model, step, progress=progress)
    return manifest.read(out)


def source_folder(model: str) -> Path:
    """A folder, the snapshot of a hub id, or the model that ships inside (`embedded`)."""
    return embedded.MODEL_DIR if model == "embedded" else find_model(model)


def _resumable(out: Path, identity: str) -> bool:
    if not manifest.is_output(out):
        return False
    if manifest.read(out).get("recipe") == identity:
        return True
    raise UsageError(
        f"{out} was made by another recipe; give another output folder, or --overwrite"
    )


def _export(recipe: Recipe, out: Path, progress: Progress) -> None:
    from dotexport.adapter import resolve
    from dotexport.export import Request, export

    wanted = {Request(*resolve(spec)).name: spec for spec in ("hf", *recipe.export)}
    made = manifest.read(out)["artifacts"]
    left = [spec for name, spec in wanted.items() if not made.get(name, {}).get("parity")]
    for number, spec in enumerate(left):
        progress(f"exporting and verifying {spec}", number, len(left))
        export(out, [spec])
    if left:
        card.write(out)


def evaluate_into(
    out: Path,
    baseline: Path,
    step: EvalStep,
    *,
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Evaluate OUT/hf beside the original and record it in OUT."""
    from dotexport.evaluate import evaluate

    windows_NL = token_windows(baseline, step.options())
    where = "cuda" if device == "auto" and _has_cuda() else device.replace("auto", "cpu")
    quality = evaluate(out / "hf", baseline, windows_NL, device=where, progress=progress)
    record = {**quality.as_dict(), "text": step.text, "seqlen": windows_NL.shape[1]}
    manifest.update(out, quality=record)
    card.write(out)
    return record


def bench_into(
    out: Path,
    baseline: Path,
    step: BenchStep,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Any:
    """Bench OUT beside the original and record the headline in OUT."""
    from dotexport.bench import Workload, bench

    workload = Workload(
        prompt_length=step.prompt,
        generation_length=step.generate,
        batch_size=step.batch,
        threads=step.threads,
        min_iterations=step.min_iterations,
        min_seconds=step.min_seconds,
        seed=step.seed,
    )
    name = bench_name(step)
    result = bench(
        out,
        baseline,
        step.target,
        precision=step.precision,
        workload=workload,
        out=out / "reports" / f"bench-{name}.json",
        progress=progress,
    )
    measured = manifest.read(out).get("bench", {}) | {name: result.headline()}
    manifest.update(out, bench=measured)
    card.write(out)
    return result


def bench_name(step: BenchStep) -> str:
    """Key of a bench in the manifest: target and precision."""
    return f"{step.target}-{step.precision}" if step.precision else step.target


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
