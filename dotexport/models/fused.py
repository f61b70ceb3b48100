"""A mixture in files and in memory: most files keep experts apart, transformers 5 keeps them in one
tensor of gates and ups, (E, 2I, D), and one of downs, (E, D, I), and its router under one name.
Where files keep them together, the class has them as they do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from dotexport.errors import UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint, TensorSpec
from dotexport.models.families import find_family
from dotexport.models.family import Family
from dotexport.models.shapes import read_sizes
from dotexport.models.stacks import Stack

MODULE = "mlp"


@dataclass(frozen=True)
class Stacked:
    """A fused tensor, and those of a checkpoint that it is made of: parts of each expert."""

    stack: Stack
    names: list[list[str]]

    def apart(self, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of its parts, by their names."""
        for parts, expert in zip(self.names, whole, strict=True):
            for place, name in enumerate(parts):
                yield name, self.stack.part(place, expert)


@dataclass(frozen=True)
class Fused(Checkpoint):
    """A checkpoint under the names that its class has in memory.

    Attributes:
        original: what is on disk.
        moved: router in memory -> in the file.
        stacks: fused tensor -> what it is made of.
    """

    original: Checkpoint
    moved: Mapping[str, str]
    stacks: Mapping[str, Stacked]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        stored = self.original.specs
        taken = {n for made in self.stacks.values() for parts in made.names for n in parts}
        specs = {name: spec for name, spec in stored.items() if name not in taken}
        for name, source in self.moved.items():
            specs[name] = specs.pop(source)
        return specs | {name: _spec(stored, made) for name, made in self.stacks.items()}

    def tensor(self, name: str) -> torch.Tensor:
        if made := self.stacks.get(name):
            spec = self.specs[name]
            whole = torch.empty(spec.shape, dtype=spec.dtype)
            for part, room in made.apart(whole):
                room.copy_(self.original.tensor(part))
            return whole
        return self.original.tensor(self.moved.get(name, name))


def _spec(stored: Mapping[str, TensorSpec], made: Stacked) -> TensorSpec:
    first = stored[made.names[0][0]]
    return TensorSpec(made.stack.shape(len(made.names), first.shape), first.dtype)


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
    stacks: dict[str, Stacked] = {}
    for layer in range(sizes.num_layers):
        for stack in family.stacks or _of_release_5(family):
            known = (
                family.layer_name(layer, one) for one in (stack.held or stack.name, stack.name)
            )
            names = [
                [family.layer_name(layer, part.format(n)) for part in stack.parts]
                for n in range(sizes.num_experts)
            ]
            if name := next(filter(parameters.__contains__, known), None):
                stacks[name] = Stacked(stack, names)
        *held, source = (family.layer_name(layer, one) for one in _router(family))
        moved |= {name: source for name in held if name in parameters and name != source}
    if not stacks:
        return checkpoint
    return Fused(checkpoint.folder, checkpoint.config, checkpoint.files, checkpoint, moved, stacks)


def as_read(
    checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a class by the names under which this checkpoint reads them."""
    view = in_memory(checkpoint, tensors)
    if not isinstance(view, Fused):
        yield from tensors.items()
        return
    for name, tensor in tensors.items():
        if name in view.stacks:
            yield from view.stacks[name].apart(tensor)
        else:
            yield view.moved.get(name, name), tensor


def _of_release_5(family: Family) -> tuple[Stack, Stack]:
    """What transformers 5 makes of experts that files keep apart."""
    [mixture] = [sublayer for sublayer in family.sublayers if sublayer.router]
    inner = [linear for linear in mixture.readers if linear.each]
    return (
        Stack(f"{MODULE}.experts.gate_up_proj", tuple(f"{one.name}.weight" for one in inner)),
        Stack(f"{MODULE}.experts.down_proj", (f"{mixture.writer.name}.weight",)),
    )


def _router(family: Family) -> tuple[str, ...]:
    """Names of its weight below a layer: those that transformers 5 has where experts are fused, and
    in the end that of files."""
    [mixture] = [sublayer for sublayer in family.sublayers if sublayer.router]
    assert mixture.router is not None
    held = (f"{MODULE}.gate.weight", f"{mixture.module}.router.weight")
    return (*held, f"{mixture.router.name}.weight")
