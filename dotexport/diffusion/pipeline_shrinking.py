"""The shrink verb for diffusers pipelines: a pipeline folder in, OUT/pipeline with a smaller
denoiser out; everything else of the pipeline is carried over byte by byte."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dotexport.diffusion import pipeline_card, saving
from dotexport.diffusion.calibration import Calibration, Progress
from dotexport.diffusion.denoiser import Stored
from dotexport.diffusion.layout import (
    Kept,
    by_loss,
    from_file,
    num_parameters,
    parse_budget,
    uniform,
)
from dotexport.diffusion.pipeline_options import (
    LayoutOptions,
    PruneOptions,
    ShrinkOptions,
    parse_share,
)
from dotexport.diffusion.pruning import SiteRecord, predict, prune, sparsify
from dotexport.diffusion.sampling import component_of, load, read_prompts
from dotexport.diffusion.sparse import Pattern
from dotexport.diffusion.surgery import Widths, layout_of, widths
from dotexport.diffusion.tables import Site, find_sites
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import check_free, new_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shrunk:
    """What shrink made."""

    out: Path
    denoiser: str
    parameters: tuple[int, int]
    kept: Kept
    sites: list[SiteRecord]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "seconds": round(self.seconds, 2)}


def shrink(
    folder: Path,
    out: Path,
    options: ShrinkOptions,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Shrunk:
    """Prune the denoiser of a pipeline and write OUT/pipeline, manifest, card and report.

    Two runs with the same inputs, options and machine give the same weights. With `resume`,
    finished packages stay beside `out` until it is whole, and are taken up again.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, SizeError, UsageError,
        RuntimeMissingError.
    """
    started = time.perf_counter()
    check_free(out, overwrite=overwrite)
    folder = saving.pipeline_of(folder)
    saving.check_apart(folder, out)
    pipe = load(folder)
    name = component_of(pipe)
    calibration = _calibration(pipe, options, progress)
    model, sites = calibration.model, find_sites(calibration.model)
    before, count = widths(model), num_parameters(model)
    identity = _identity(folder, name, calibration.prompts, options)
    stored = Stored.beside(out, identity) if resume else Stored()
    with new_folder(out, overwrite=overwrite) as partial:
        kept, records = _prune(calibration, sites, options, stored)
        shrunk = Shrunk(
            out,
            name,
            (count, num_parameters(model)),
            kept,
            records,
            time.perf_counter() - started,
        )
        _write(partial, folder, model, before, options, shrunk, calibration.prompts)
    stored.clear()
    return shrunk


def _calibration(pipe: Any, options: ShrinkOptions, progress: Progress) -> Calibration:
    model = getattr(pipe, component_of(pipe))
    return Calibration(
        pipe=pipe,
        prompts=read_prompts(pipe, options.sampling),
        options=options.sampling,
        weights=options.prune.weights,
        teacher=copy.deepcopy(model) if options.prune.feedback else None,
        progress=progress,
    )


def _prune(
    calibration: Calibration, sites: Sequence[Site], options: ShrinkOptions, stored: Stored
) -> tuple[Kept, list[SiteRecord]]:
    if options.sparsity is not None:
        pattern = Pattern.parse(options.sparsity)
        return {}, sparsify(calibration, sites, pattern, options.prune)
    assert options.layout is not None  # ShrinkOptions saw to it
    kept = decide(calibration, sites, options.layout, options.prune)
    return kept, prune(calibration, sites, kept, options.prune, stored)


def decide(
    calibration: Calibration,
    sites: Sequence[Site],
    layout: LayoutOptions,
    options: PruneOptions,
) -> Kept:
    """How many units each site keeps."""
    if layout.file is not None:
        return from_file(sites, layout.file)
    even = uniform(calibration.model, sites, layout)
    if layout.allocation == "uniform":
        return even
    curves = predict(calibration, sites, _share(calibration.model, layout), options)
    return by_loss(calibration.model, sites, curves, even, layout.params is not None)


def _share(model: nn.Module, layout: LayoutOptions) -> float:
    """About how much of each site stays."""
    if layout.params is not None:
        total = num_parameters(model)
        return parse_budget(layout.params, total) / total
    return min(parse_share(share) for share in (layout.heads, layout.ffn) if share)


def _identity(folder: Path, name: str, prompts: Sequence[Any], options: ShrinkOptions) -> str:
    weights = {file.name: manifest.sha256(file) for file in saving.weight_files(folder / name)}
    told = json.dumps([weights, list(prompts), asdict(options)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _write(
    partial: Path,
    folder: Path,
    model: nn.Module,
    before: Widths,
    options: ShrinkOptions,
    shrunk: Shrunk,
    prompts: Sequence[Any],
) -> None:
    layout = layout_of(model, before)
    form = saving.save(model, shrunk.denoiser, layout, folder, partial / "pipeline")
    recipe = json.loads(json.dumps(asdict(options)))
    manifest.update(
        partial,
        kind="diffusion",
        source=saving.describe_source(folder, shrunk.denoiser),
        shrink=recipe | {"sha256": hashlib.sha256(json.dumps(recipe).encode()).hexdigest()},
        calibration={
            "prompts": len(prompts),
            "examples": list(prompts[:3]),  # what parity is measured on later
            "sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        },
        sizes={"parameters": list(shrunk.parameters), "kept": shrunk.kept},
        denoiser={"component": shrunk.denoiser, "class": form},
        artifacts={"pipeline": saving.artifact(partial / "pipeline")},
        timings={"shrink_seconds": round(shrunk.seconds, 2)},
        environment=manifest.environment(),
    )
    write_json(partial / "reports" / "shrink.json", shrunk.as_dict())
    pipeline_card.write(partial)
