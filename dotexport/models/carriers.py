"""Carriers: the same model under another stock class, exactly.

Runtimes honour some classes better than others, so a family may name classes that compute the same
(its `carriers`). The re-badge reads the source tensor by tensor: fused matrices come apart, a bias
that only the carrier has is zero, and the multipliers of Granite go into the weights. Torch then
computes the same logits; only the multipliers cost a rounding, of the float32 in which weights are
read here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint, TensorSpec
from dotexport.models.families import apart, carried_biases
from dotexport.models.family import Family
from dotexport.models.rope import stock_config
from dotexport.models.shapes import read_sizes, shapes

# config.json key of Granite -> what it is where nothing is multiplied.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class Part:
    """Where a tensor of the carrier comes from.

    Attributes:
        source: tensor of the original; None: zeros.
        start, stop: which of its rows.
        scale: what they are multiplied with.
    """

    source: str | None
    start: int = 0
    stop: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Carried(Checkpoint):
    """A checkpoint that is read as another class: nothing of it lies on disk.

    Attributes:
        original: what is on disk.
        parts: tensor of the carrier -> where it comes from.
        shapes: its shape.
    """

    original: Checkpoint
    parts: Mapping[str, Part]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        stored = self.original.specs
        table = next(iter(stored.values())).dtype
        zeros = TensorSpec((), table)
        found = {name: stored[p.source] if p.source else zeros for name, p in self.parts.items()}
        return {name: replace(spec, shape=self.shapes[name]) for name, spec in found.items()}

    def tensor(self, name: str) -> torch.Tensor:
        part = self.parts[name]
        if part.source is None:
            return torch.zeros(self.shapes[name], dtype=self.specs[name].dtype)
        rows = self.original.tensor(part.source)[part.start : part.stop]
        return rows if part.scale == 1.0 else rows.float() * part.scale


def recast(
    source: Checkpoint, config: Mapping[str, Any], family: Family, carrier: Family
) -> Checkpoint:
    """The source under the carrier's class, whose config.json is `config`.

    Every tensor is read from the source's files when it is asked for.
    """
    expected = dict(shapes(carrier, read_sizes(carrier, config)))
    parts = dict(_parts(source.config, family, carrier, expected))
    files = {name: source.files[part.source] for name, part in parts.items() if part.source}
    return Carried(source.folder, config, files, source, parts, expected)


def is_carried(config: Mapping[str, Any], family: Family, carrier: Family) -> bool:
    """Whether anything is read otherwise than it lies on disk."""
    return carrier is not family or any(config.get(key, 1.0) != 1.0 for key in MULTIPLIERS)


def carried_config(config: Mapping[str, Any], family: Family, carrier: Family) -> dict[str, Any]:
    """config.json of the carrier at the same sizes: every key that both classes have.

    Raises:
        UnsupportedModelError: part of each head is not rotated, which no carrier does.
    """
    known = set(stock_config({"model_type": carrier.model_type}).to_dict())
    same = dict(config) if carrier is family else _shared(config, family, carrier, known)
    sizes = read_sizes(family, config)
    neutral: dict[str, Any] = dict.fromkeys(MULTIPLIERS, 1.0) if MULTIPLIERS[0] in known else {}
    if "attention_multiplier" in known - set(same) and carrier is not family:
        neutral["attention_multiplier"] = sizes.head_dim**-0.5
    if carrier.windows and not family.windows and "sliding_window" in known:
        neutral["sliding_window"] = None  # the class has one where nothing is said
    flags = dict.fromkeys(sorted(carried_biases(family, carrier, sizes)), True)
    return {
        **same,
        **neutral,
        **flags,
        "architectures": [carrier.architecture],
        "model_type": carrier.model_type,
        "head_dim": sizes.head_dim,
    }


def _shared(
    config: Mapping[str, Any], family: Family, carrier: Family, known: Collection[str]
) -> dict[str, Any]:
    """What a class makes of its config.json, of all that the carrier knows as well.

    Raises:
        UnsupportedModelError: part of each head is not rotated.
    """
    full = stock_config({**config, "model_type": family.model_type}).to_dict()
    rope = full.get("rope_parameters") or full  # before transformers 5: at the top
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {rotated} is not supported: {carrier.architecture}, as which "
            f"{family.architecture} is written, rotates whole heads"
        )
    return {key: value for key, value in full.items() if key in known}


def _parts(
    config: Mapping[str, Any], family: Family, carrier: Family, expected: Iterable[str]
) -> Iterator[tuple[str, Part]]:
    """Every tensor of the carrier, in the order of its shapes."""
    sizes = read_sizes(family, config)
    embedding, residual, logits = (_multiplier(config, key) for key in MULTIPLIERS)
    scales = {f"{family.embedding}.weight": embedding}
    # The head divides by its scaling, and a shared table has the embedding's multiplier in it.
    scales[f"{family.final_norm}.weight"] = 1 / (logits * (embedding if sizes.tied else 1.0))
    sources: dict[str, Part] = {}
    for layer in range(sizes.num_layers):
        for linear, theirs, rows in apart(family, carrier, sizes, [sizes.kind(layer)]):
            scale = residual if linear.out == "residual" else 1.0
            kept = (*rows, scale)
            both = (one.names(sizes.num_experts) for one in (theirs, linear))
            for their_name, our_name in zip(*both, strict=True):
                name = carrier.layer_name(layer, their_name)
                found = family.layer_name(layer, our_name)
                sources[f"{name}.weight"] = Part(f"{found}.weight", *kept)
                bias = f"{found}.bias" if sizes.has_bias(linear) else None
                sources[f"{name}.bias"] = Part(bias, *kept)
    for name in expected:
        yield name, sources.get(name) or Part(name, scale=scales.get(name, 1.0))


def _multiplier(config: Mapping[str, Any], key: str) -> float:
    """Raises CheckpointError where config.json says that it is none."""
    if (said := config.get(key, 1.0)) is None:
        raise CheckpointError(
            f"config.json gives {key} = null; expected a number, or no such word: take the "
            "config.json that belongs to these weights"
        )
    return float(said)
