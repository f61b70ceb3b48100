"""Weights rounded for what they will read: the checkpoint walks through a text layer by layer, and
every matrix is rounded on the Gram matrix of its inputs (merging/rounding.py).

What an artifact then holds is not the nearest level any more, so its manifest says what was
chosen, and `wrong_values` holds the file to that and to the checkpoint.

Shapes: N windows, L tokens per window, D hidden_size; O, I outputs and inputs of a matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotexport.axes.plan import read_model
from dotexport.errors import UnsupportedModelError, UsageError
from dotexport.exports.target import Target
from dotexport.merging.gram import gram
from dotexport.merging.rounding import MOST_ERROR, Grid, Rounded, moved, nearest, solve
from dotexport.models.beside import Through
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.layers import Layer, Stock, layer_tensors
from dotexport.narrowing.original import Original
from dotexport.narrowing.prepare import usual_passes
from dotexport.narrowing.streams import Step, Streams, check_finite

Progress = Callable[[str, int, int], None]
Grids = Mapping[str, Grid]

STAGE = "rounding weights for what they read"
MOST_NAMED = 5
TINY = 1e-7
SLACK = 1e-3  # float32 sums a row in another order when it is read back


@dataclass(frozen=True)
class Text:
    """What weights are rounded for.

    Attributes:
        windows_NL: tokens.
        told: what the manifest says of it.
    """

    windows_NL: Tensor
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """The rounding of one artifact.

    Attributes:
        rounded: tensor of the checkpoint -> its levels.
        record: for the manifest: the text, and of each tensor its relative error in outputs
            (`loss`), that of rounding to nearest, and the SHA-256 of its values.
    """

    rounded: dict[str, Rounded] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def grids_of(target: Target, checkpoint: Checkpoint, precision: str) -> Grids:
    """Tensors of a checkpoint that this target rounds with scales of its own choice; empty: none,
    or it cannot be told how."""
    ask = getattr(target, "grids", None)
    found: Grids = ask(checkpoint, precision) if ask else {}
    return found


def require_grids(asked: Iterable[tuple[Target, str]], checkpoint: Checkpoint) -> None:
    """Refuse what has no rounding to choose.

    Raises:
        UsageError: with every such target.
    """
    idle = [f"{t.name}:{p}" for t, p in asked if not grids_of(t, checkpoint, p)]
    if idle:
        raise UsageError(
            f"--calib chooses how weights are rounded to integers, which {', '.join(idle)} does "
            "not, or leaves to its library; expected ort-cpu:int4, onnx:int4, "
            "onnx:int4-fp16 or an integer "
            "precision of gguf: export the others without --calib"
        )


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    text: Text,
    wanted: Sequence[Grids],
    *,
    device: torch.device | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Calibrated]:
    """Round the tensors of each of `wanted`; the text is read once for all of them.

    Raises:
        UnsupportedModelError: no family table for this class.
        CheckpointError: activations on the text are NaN or infinite.
    """
    made = [Calibrated(record={**text.told, "tensors": {}}) for _ in wanted]
    for names, gram_II in _inputs(checkpoint, text, device or torch.device("cpu"), progress):
        for name in names:
            for grids, calibrated in zip(wanted, made, strict=True):
                if name in grids:
                    _round(checkpoint.tensor(name), name, gram_II, grids[name], calibrated)
    return made


def _round(weights_OI: Tensor, name: str, gram_II: Tensor, grid: Grid, into: Calibrated) -> None:
    solved = solve(weights_OI.to(gram_II.device).float(), gram_II, grid)
    into.rounded[name] = Rounded(solved.rounded.levels_OI.cpu(), solved.rounded.stored_OGS.cpu())
    into.record["tensors"][name] = {
        "loss": solved.loss,
        "nearest": solved.nearest,
        "sha256": digest(solved.values_OI),
    }


def digest(values_OI: Tensor) -> str:
    """SHA-256 of a matrix in float32; zero has one sign."""
    plain = (values_OI.cpu().float() + 0.0).contiguous().numpy()
    return hashlib.sha256(plain.astype("<f4", copy=False).tobytes()).hexdigest()


def _inputs(
    checkpoint: Checkpoint, text: Text, device: torch.device, progress: Progress
) -> Iterator[tuple[list[str], Tensor]]:
    """Names of matrices that read the same, and the Gram matrix of what they read."""
    family, sizes = read_model(checkpoint.config)
    if sizes.mixture:
        raise UnsupportedModelError(
            f"--calib: experts of {family.architecture} see different tokens, and each its own; "
            "export it without --calib"
        )
    stored = {spec.dtype for spec in checkpoint.specs.values() if len(spec.shape) == 2}
    passes = usual_passes(sizes.hidden_size, stored, device)
    stock = Stock.of(checkpoint.config, device, passes)
    model = Original(checkpoint, family, sizes, stock, device)
    streams = Streams.allocate(text.windows_NL, sizes.hidden_size, 0, device=device)
    model.enter(model.embedding(), streams)
    for number in range(sizes.num_layers):
        progress(STAGE, number, sizes.num_layers + 1)
        tensors = layer_tensors(family, number, model.read, checkpoint.specs)
        layer = Layer(stock, family, number, tensors)
        for sublayer in layer.sublayers:
            prefix = family.layer_name(number, "")
            readers = [f"{prefix}{linear.name}.weight" for linear in sublayer.readers]
            yield readers, _gram(streams, _alone(partial(layer.normalise, sublayer)))
            inside = partial(layer.inside, sublayer)
            yield [f"{prefix}{sublayer.writer.name}.weight"], _gram(streams, inside)
            streams.advance_original(partial(layer.after, sublayer))
    progress(STAGE, sizes.num_layers, sizes.num_layers + 1)
    norm, gamma_D = stock.norm(device), model.gamma()
    head = family.embedding if sizes.tied else family.head.name
    gram_DD = _gram(streams, _alone(lambda stream_BLD: norm(stream_BLD) * gamma_D))
    yield [f"{head}.weight"], gram_DD


def _alone(read: Step) -> Through:
    """What is read of the stream, whatever lies beside it."""
    return lambda stream_BLD, beside: read(stream_BLD)


def _gram(streams: Streams, read: Through) -> Tensor:
    """Sum of z z^T over all tokens, float64."""
    total_II: Tensor | None = None
    for rows in streams.batches():
        beside = streams.beside_original.of(rows)
        found_II = gram(read(streams.original(rows), beside).flatten(0, 1)).double()
        total_II = found_II if total_II is None else total_II + found_II
    assert total_II is not None
    check_finite(total_II.diagonal().sum())
    return total_II


def wrong_values(
    target: Target,
    precision: str,
    folder: Path,
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
) -> list[str]:
    """What the matrices of an artifact are that they should not be: other than what was chosen for
    them, or further from the checkpoint than any choice may go."""
    told, grids = record["tensors"], grids_of(target, checkpoint, precision)
    ask: Any = target  # one that has grids has `values` as well
    found = {
        name: _wrong(values_OI, checkpoint.tensor(name).float(), grids[name], told.get(name))
        for name, values_OI in ask.values(checkpoint, folder)
        if name in grids
    }
    missing = dict.fromkeys(told.keys() - found.keys(), "it is not in the file")
    problems = [f"{name}: {why}" for name, why in {**found, **missing}.items() if why]
    more = len(problems) - MOST_NAMED
    return problems[:MOST_NAMED] + ([f"... and {more} more like these"] if more > 0 else [])


def _wrong(
    values_OI: Tensor, weights_OI: Tensor, grid: Grid, told: Mapping[str, Any] | None
) -> str | None:
    if values_OI.shape != weights_OI.shape:
        return f"it is stored as {tuple(values_OI.shape)}, expected {tuple(weights_OI.shape)}"
    allowed_O = MOST_ERROR * moved(nearest(weights_OI, grid)[1], weights_OI)
    far_O = moved(values_OI, weights_OI) > allowed_O * (1 + SLACK) + TINY
    if bool(far_O.any()):
        return (
            f"{int(far_O.sum()):,} of {len(far_O):,} rows are further from the checkpoint than "
            f"{MOST_ERROR:g} times what rounding to nearest costs them"
        )
    if told is None or told["sha256"] != digest(values_OI):
        return "its values are not those that were chosen for it"
    return None
