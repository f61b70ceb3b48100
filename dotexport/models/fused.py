"""A mixture in files and in memory: files keep experts apart, transformers 5 keeps them in one
tensor of gates and ups, (E, 2I, D), and one of downs, (E, D, I), and its router under one name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dotexport.errors import UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint, TensorSpec
from dotexport.models.families import find_family
from dotexport.models.family import Family
from dotexport.models.shapes import read_sizes

Names = list[list[str]]
"""Tensors of a file: those of an expert one below another, the experts behind one another."""

MODULE = "mlp"


@dataclass(frozen=True)
class Fused(Checkpoint):
    """A checkpoint under the names that its class has in memory.

    Attributes:
        original: what is on disk.
        moved: router in memory -> in the file.
        stacks: fused tensor -> those that it is made of.
    """

    original: Checkpoint
    moved: Mapping[str, str]
    stacks: Mapping[str, Names]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        stored = self.original.specs
        taken = {n for names in self.stacks.values() for expert in names for n in expert}
        specs = {name: spec for name, spec in stored.items() if name not in taken}
        for name, source in self.moved.items():
            specs[name] = specs.pop(source)
        return specs | {name: _stacked(stored, names) for name, names in self.stacks.items()}

    def tensor(self, name: str) -> torch.Tensor:
        if names := self.stacks.get(name):
            read = self.original.tensor
            return torch.stack([torch.cat([read(n) for n in expert]) for expert in names])
        return self.original.tensor(self.moved.get(name, name))


def _stacked(stored: Mapping[str, TensorSpec], names: Names) -> TensorSpec:
    first = stored[names[0][0]]
    rows, columns = first.shape
    return replace(first, shape=(len(names), rows * len(names[0]), columns))


def in_memory(checkpoint: Checkpoint, parameters: Collection[str]) -> Checkpoint:
    """The checkpoint as the class names its parameters; itself where it fuses nothing.

    Raises:
        CheckpointError: sizes of a mixture are missing.
    """
    try:
        family = find_family(checkpoint.config)
    except UnsupportedModelError:  # no mixture that is known here
        return checkpoint
    if family.experts_key is None:
        return checkpoint
    sizes = read_sizes(family, checkpoint.config)
    moved: dict[str, str] = {}
    stacks: dict[str, Names] = {}
    for layer in range(sizes.num_layers):
        for name, names in _fused(family, layer, sizes.num_experts):
            if name not in parameters:
                continue
            if name.endswith(".weight"):
                moved[name] = names[0][0]
            else:
                stacks[name] = names
    if not stacks:
        return checkpoint
    return Fused(checkpoint.folder, checkpoint.config, checkpoint.files, checkpoint, moved, stacks)


def in_files(
    checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a class as the files of this checkpoint have them."""
    view = in_memory(checkpoint, tensors)
    if not isinstance(view, Fused):
        yield from tensors.items()
        return
    for name, tensor in tensors.items():
        if name not in view.stacks:
            yield view.moved.get(name, name), tensor
            continue
        for expert, stacked in zip(view.stacks[name], tensor, strict=True):
            yield from zip(expert, stacked.chunk(len(expert)), strict=True)


def _fused(family: Family, layer: int, num_experts: int) -> Iterator[tuple[str, Names]]:
    """Tensors of a layer's mixture in memory, and those that they are in a file."""
    [mixture] = [sublayer for sublayer in family.sublayers if sublayer.router]
    assert mixture.router is not None
    inner = [linear for linear in mixture.readers if linear.each]
    for name, linears in (
        ("gate.weight", [mixture.router]),
        ("experts.gate_up_proj", inner),
        ("experts.down_proj", [mixture.writer]),
    ):
        copies = num_experts if linears[0].each else 1
        yield (
            family.layer_name(layer, f"{MODULE}.{name}"),
            [
                [family.layer_name(layer, f"{one.name.format(n)}.weight") for one in linears]
                for n in range(copies)
            ],
        )
