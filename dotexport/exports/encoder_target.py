"""Targets that hold text encoders: what such an adapter offers besides, and what it is given.

Shapes: B sequences of a batch, L tokens of the longest one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.target import Target, find_target, parse_spec, target_names

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class EncoderGraph:
    """A stock encoder as a function of named tensors, to be traced.

    Attributes:
        model: in evaluation, float32.
        inputs: names of what it reads, (B, L) of int64 each, input_ids first.
        outputs: names of what it answers with.
        context: tokens of a sequence, at most.
        programs: what was traced of it, by the arguments of `program`.
    """

    model: torch.nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    context: int
    programs: dict[tuple[bool, bool], ExportedProgram] = field(default_factory=dict)

    def program(self, *, half: bool = False, single: bool = False) -> ExportedProgram:
        """The graph of torch.export, its outputs float32; traced once.

        Args:
            half: weights and what is computed in float16.
            single: of one sequence at a time, any length up to the context; otherwise any batch.
        """
        if (half, single) not in self.programs:
            self.programs[half, single] = self._traced(half=half, single=single)
        return self.programs[half, single]

    def _traced(self, *, half: bool, single: bool) -> ExportedProgram:
        import torch

        # Neither 0 nor 1 of anything dynamic, which would be taken for a constant.
        tokens_BL = torch.full((1 if single else 2, 3), 5)
        tensors = (tokens_BL, *(torch.ones_like(tokens_BL) for _ in self.inputs[1:]))
        length = torch.export.Dim.DYNAMIC(max=self.context)
        axes = {1: length} if single else {0: torch.export.Dim.AUTO, 1: length}
        model = copy.deepcopy(self.model).half() if half else self.model
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                _function(model, self.inputs, self.outputs),
                tensors,
                dynamic_shapes=(tuple(dict(axes) for _ in tensors),),
                strict=False,
            )


def _function(
    model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> torch.nn.Module:
    import torch

    class Function(torch.nn.Module):
        """The stock model with plain tensors on both sides."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = self.model(**dict(zip(inputs, tensors, strict=True)))
            return tuple(made[name].float() for name in outputs)

    return Function().eval()


class EncoderSession(Protocol):
    """An artifact of an encoder, loaded in its own runtime."""

    def __call__(self, inputs: Arrays) -> list[NDArray[Any]]:
        """What the graph's outputs are, in its order, float32; inputs stand in its order too, and
        are padded on the right."""
        ...


class EncoderTarget(Target, Protocol):
    """A target that takes text encoders as well."""

    encoder_precisions: tuple[str, ...]
    """What it can write of them, the default first."""

    def write_encoder(self, graph: EncoderGraph, folder: Path, precision: str) -> None:
        """Write the graph into a folder that holds config.json and the tokenizer already."""
        ...

    def open_encoder(self, folder: Path, *, threads: int | None = None) -> EncoderSession:
        """Load what `write_encoder` made there."""
        ...


def resolve_encoder(spec: str) -> tuple[EncoderTarget, str]:
    """The target of a spec and the precision to write, its default where the spec names none.

    Raises:
        UsageError: an unknown target, one that takes no encoders, or no such precision.
        RuntimeMissingError: its runtime is not installed.
    """
    name, precision = parse_spec(spec)
    target: Any = find_target(name)
    known: tuple[str, ...] = getattr(target, "encoder_precisions", ())
    if not known:
        raise UsageError(
            f"target {name} holds no text encoder; expected {', '.join(encoder_targets())}"
        )
    if precision is not None and precision not in known:
        raise UsageError(
            f"target {name} cannot write an encoder as {precision!r}; it writes {', '.join(known)}"
        )
    if missing := target.missing():
        raise RuntimeMissingError(f"target {name} needs: {'; '.join(missing)}")
    return target, precision or known[0]


def encoder_targets() -> list[str]:
    """Names of the targets that take encoders and can be imported here."""
    return [name for name in target_names() if _takes_encoders(name)]


def _takes_encoders(name: str) -> bool:
    try:
        return bool(getattr(find_target(name), "encoder_precisions", ()))
    except RuntimeMissingError:
        return False
