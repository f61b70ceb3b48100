"""Latents as pictures, pictures as points of a feature space, and how far apart two clouds are.

Shapes: B pictures, C channels, H height, W width, F features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.errors import UsageError

WARNING = (
    "the Frechet distance is not monotone: removing heads at random can score better than the "
    "dense model; trust the held-out loss and the deviation"
)
TILE = 64
Array = NDArray[np.float64]
Features = Callable[[Tensor], Array]


def feature_space(name: str) -> Features:
    """`latents` or `pixels` as they are, or MODULE:FUNCTION from (B, C, H, W) to (B, F).

    Raises:
        UsageError: nothing of this name.
    """
    if name in ("latents", "pixels"):
        return _flat
    module, _, function = name.partition(":")
    try:
        extract = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--features {name} cannot be found ({error}); expected latents, pixels, or "
            "MODULE:FUNCTION that turns pictures (B, C, H, W) in 0 ... 1 into features (B, F)"
        ) from error
    return lambda pictures: np.asarray(extract(pictures), dtype=np.float64)


def _flat(pictures: Tensor) -> Array:
    flat_BF: Array = pictures.flatten(1).double().numpy()
    return flat_BF


def frechet(one_BF: Array, two_BF: Array) -> float:
    """|mean - mean'|^2 + tr(S + S' - 2 (S S')^1/2) of two clouds (Heusel et al. 2017).

    >>> round(frechet(np.eye(3), np.eye(3) + 1), 6)
    3.0
    """
    gap_F = one_BF.mean(0) - two_BF.mean(0)
    first_FF, second_FF = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (one_BF, two_BF))
    values, vectors = np.linalg.eigh(first_FF)
    root_FF = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # (S S')^1/2 has the eigenvalues of the symmetric (S^1/2 S' S^1/2)^1/2.
    crossed = np.linalg.eigvalsh(root_FF @ second_FF @ root_FF).clip(0)
    spread = np.trace(first_FF) + np.trace(second_FF) - 2 * np.sqrt(crossed).sum()
    return float(gap_F @ gap_F + max(spread, 0.0))


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, options: SampleOptions) -> Tensor:
    """Pictures (B, C, H, W) in 0 ... 1; without a VAE the latents are the pictures."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return (latents / 2 + 0.5).clamp(0, 1)
    if latents.ndim == 3:  # packed, as Flux does
        side = pipe.default_sample_size * pipe.vae_scale_factor
        size = (options.height or side, options.width or side)
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
    pictures: Tensor = (decoded / 2 + 0.5).clamp(0, 1)
    return pictures


def save_grid(file: Path, rows: Sequence[Tensor], *, columns: int = 10) -> None:
    """One row of pictures per model, the first ones of each, as PNG."""
    from PIL import Image

    lines = [torch.cat(list(row[:columns]), dim=2) for row in rows]
    grid_CHW = torch.cat(lines, dim=1)
    grid_HWC = (grid_CHW.permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(grid_HWC[..., 0] if grid_HWC.shape[2] == 1 else grid_HWC[..., :3])
    scale = max(1, TILE // rows[0].shape[-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)
