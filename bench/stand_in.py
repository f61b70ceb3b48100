"""Checkpoints with random weights: as fast as trained ones, for sizes that nobody has trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dotexport.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from dotexport.families import find_family, read_sizes, shapes
from dotexport.output import write_json

SCALE = 0.04  # of matrices; large enough for finite, distinct logits


def write_stand_in(
    folder: Path,
    config: Mapping[str, Any],
    companions: Iterable[Path] = (),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Checkpoint:
    """Write a checkpoint of this config.json into an empty folder.

    Args:
        companions: files that travel with it, a tokenizer among them.

    Raises:
        UnsupportedModelError, CheckpointError: no config of a known family.
    """
    write_json(folder / "config.json", dict(config))
    for file in companions:
        shutil.copyfile(file, folder / file.name)
    family = find_family(config)
    sizes = read_sizes(family, config)
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes(family, sizes)}
    writer = CheckpointWriter(folder, specs)
    generator = torch.Generator().manual_seed(seed)
    for name, spec in specs.items():
        writer.write(name, _values(spec, generator))
    writer.finish()
    return Checkpoint.open(folder)


def _values(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """Norms (and biases) of one, everything else Gaussian."""
    if len(spec.shape) == 1:
        return torch.ones(spec.shape)
    return torch.randn(spec.shape, generator=generator) * SCALE
