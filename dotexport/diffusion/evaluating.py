"""What pruning cost: held-out denoising loss, deviation of samples at the same noise, Frechet
distance, and a picture of both.

Latents keep the shape that the denoiser reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotexport.diffusion import pictures, pipeline_card, saving
from dotexport.diffusion.calibration import Progress
from dotexport.diffusion.denoising import denoising_losses
from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.diffusion.sampling import batches, component_of, load, read_prompts, sample
from dotexport.errors import CalibrationError
from dotexport.storage import manifest
from dotexport.storage.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quality:
    """Dense beside pruned.

    Attributes:
        loss, dense_loss: mean squared error of the denoiser's answer at held-out latents.
        deviation: squared distance of samples from the dense ones at the same noise, over the
            variance of those.
        frechet, dense_frechet: distances of the samples from the held-out latents in `features`;
            without those, from the dense samples.
        held_out: what the losses were taken on.
    """

    loss: float
    dense_loss: float
    deviation: float
    features: str | None
    frechet: float | None
    dense_frechet: float | None
    num_samples: int
    held_out: str

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"ratio": self.loss / self.dense_loss}


@dataclass(frozen=True)
class Samples:
    """What the dense and the pruned pipeline made of the same noise."""

    dense: Tensor
    pruned: Tensor


def evaluate(
    pruned: Path,
    dense: Path,
    options: SampleOptions,
    *,
    held_out: Path | None = None,
    features: str | None = None,
    grid: Path | None = None,
    repeats: int = 8,
    progress: Progress = lambda stage, done, total: None,
) -> Quality:
    """Compare two pipelines on the same prompts and noises.

    Args:
        held_out: safetensors with `latents` (as the denoiser reads them), one per prompt; without,
            samples of the dense pipeline take their place.
        features: `latents`, `pixels`, or MODULE:FUNCTION from pictures (B, C, H, W) to (B, F).
        grid: where a picture of both goes.
        repeats: noises and times at which each held-out picture is tried.

    Raises:
        CalibrationError: prompts or latents that cannot serve.
        UsageError: an unknown feature space.
    """
    extract = pictures.feature_space(features) if features else None
    pipe, other = load(dense), load(pruned)
    prompts = read_prompts(pipe, options)
    made = sample_both(pipe, other, prompts, options, progress)
    latents = made.dense if held_out is None else read_latents(held_out, len(prompts))
    models = [getattr(p, component_of(p)) for p in (pipe, other)]
    losses = denoising_losses(pipe, models, prompts, latents, options, repeats, progress)
    distances: list[float | None] = [None, None]
    if extract is not None:
        logger.warning(pictures.WARNING)
        shown = [
            extract(some if features == "latents" else pictures.decode(pipe, some, options))
            for some in (latents, made.dense, made.pruned)
        ]
        distances = [pictures.frechet(shown[0], some) for some in shown[1:]]
    if grid is not None:
        rows = [pictures.decode(pipe, some, options) for some in (made.dense, made.pruned)]
        pictures.save_grid(grid, rows)
    return Quality(
        losses[1],
        losses[0],
        deviation(made),
        features,
        distances[1],
        distances[0],
        len(prompts),
        "samples of the dense model" if held_out is None else held_out.name,
    )


def deviation(made: Samples) -> float:
    """E|pruned - dense|^2 over the variance of the dense samples."""
    spread = (made.dense - made.dense.mean(0)).square().mean()
    return float((made.pruned - made.dense).square().mean() / spread)


def sample_both(
    pipe: Any, other: Any, prompts: Sequence[Any], options: SampleOptions, progress: Progress
) -> Samples:
    rows: list[list[Tensor]] = [[], []]
    for first, some in batches(prompts, options.batch):
        for row, each in zip(rows, (pipe, other), strict=True):
            row.append(sample(each, some, first, options))
        progress("sampling", first + len(some), len(prompts))
    return Samples(torch.cat(rows[0]), torch.cat(rows[1]))


def read_latents(file: Path, count: int) -> Tensor:
    """Held-out latents, one per prompt.

    Raises:
        CalibrationError: no such tensor, or another number of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)["latents"].float()
    except (OSError, KeyError, SafetensorError) as error:
        raise CalibrationError(
            f"{file} cannot serve as held-out latents ({error}); expected safetensors with a "
            "tensor `latents`, one row per prompt"
        ) from error
    if len(found) != count:
        raise CalibrationError(f"{file} holds {len(found)} latents for {count} prompts")
    return found


def evaluate_into(
    out: Path,
    baseline: Path,
    options: SampleOptions,
    *,
    held_out: Path | None = None,
    features: str | None = None,
    repeats: int = 8,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Evaluate an output beside the original, and record it there with a grid of pictures."""
    manifest.read(out)  # refuses what is no output
    quality = evaluate(
        out / saving.FOLDER,
        saving.pipeline_of(baseline),
        options,
        held_out=held_out,
        features=features,
        grid=out / "reports" / "grid.png",
        repeats=repeats,
        progress=progress,
    )
    record = quality.as_dict() | {"steps": options.steps, "seed": options.seed}
    manifest.update(out, quality=record)
    write_json(out / "reports" / "quality.json", record)
    if "shrink" in manifest.read(out):
        pipeline_card.write(out)
    return record
