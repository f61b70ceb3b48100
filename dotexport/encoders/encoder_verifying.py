"""The verify verb for text encoders: every artifact against torch, on padded and on long batches.

Shapes: B sequences of a batch, L tokens of the longest one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotexport.encoders.encoder_folder import Encoder, open_encoder, rows_of
from dotexport.encoders.kinds import STOCK, outputs_of, reads_segments
from dotexport.encoders.sentences import context_of
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.encoder_target import EncoderGraph, EncoderTarget, resolve_encoder
from dotexport.exports.verifying import REPORT
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 2e-1}
"""Precision -> how far an output may be from torch's, ||ours - theirs|| / ||theirs||. Of int8 that
is what rounding may cost, not what arithmetic may differ by."""
SHAPES, LONGEST = ((1, 1), (3, 17), (2, 64)), 1024
"""Batches x tokens, and the longest one: attention over 8,192 tokens is 3 GB a layer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """How far an artifact is from torch.

    Attributes:
        difference: the worst of all outputs and batches, relative, in the 2-norm; None: it does
            not run, or there is nothing to run.
        shapes: batches x tokens that were tried.
    """

    artifact: str
    difference: float | None
    limit: float
    shapes: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "shapes": list(self.shapes),
            "problems": list(self.problems),
            "passed": self.passed,
        }


def graph_of(encoder: Encoder) -> EncoderGraph:
    """What a target is given to write."""
    more = ("token_type_ids",) if reads_segments(encoder.config) else ()
    inputs = ("input_ids", "attention_mask", *more)
    outputs = outputs_of(type(encoder.model).__name__)
    return EncoderGraph(encoder.model, inputs, outputs, context_of(encoder), encoder.programs)


def verify(out: Path, specs: Sequence[str] | None = None) -> list[Parity]:
    """Hold artifacts of an output against torch; the manifest and reports/verify.json say so.

    Raises:
        CheckpointError: not an output of dotexport.
        UsageError: a target that is not there.
    """
    listed = manifest.read(out).get("artifacts", {})
    wanted = list(listed) if specs is None else [named(spec, listed, out) for spec in specs]
    encoder = open_encoder(out)
    parities = []
    for name in wanted:
        entry = listed[name]
        if name == STOCK:  # it has been opened
            parity = Parity(STOCK, None, 0.0, ())
        else:
            target, precision = resolve_encoder(f"{entry['target']}:{entry['precision']}")
            place = out / name / encoder.home.relative_to(encoder.root)
            parity = check(target, precision, encoder, place, name)
        changed = manifest.changed_files(out / name, entry["files"])
        parities.append(replace(parity, problems=(*changed, *parity.problems)))
    told = {p.artifact: listed[p.artifact] | {"parity": p.as_dict()} for p in parities}
    manifest.merge(out, artifacts=told)
    write_report(out, parities)
    return parities


def named(spec: str, listed: dict[str, Any], out: Path) -> str:
    """The artifact that is meant by its folder's name or by NAME:PRECISION.

    Raises:
        UsageError: there is none.
    """
    name = spec.replace(":", "-")
    found = [one for one in listed if one == name or listed[one]["target"] == spec]
    if not found:
        raise UsageError(
            f"{out} has no artifact of {spec}; it has {', '.join(listed)}: write one "
            "with dotexport export"
        )
    return found[0]


def check(
    target: EncoderTarget, precision: str, encoder: Encoder, folder: Path, artifact: str
) -> Parity:
    """Measure one artifact; one that cannot be run has failed.

    Args:
        folder: where its config.json lies.
    """
    limit, problems = LIMITS[precision], []
    worst, shapes = 0.0, []
    try:
        session = target.open_encoder(folder)
        for inputs in _batches(graph_of(encoder)):
            shapes.append(" x ".join(map(str, inputs["input_ids"].shape)))
            arrays = {name: value.numpy() for name, value in inputs.items()}
            made = [torch.from_numpy(value) for value in session(arrays)]
            worst = max(worst, *_differences(encoder, inputs, made))
    except (RuntimeMissingError, MemoryError):
        raise
    except Exception as error:  # the runtime has its own; all of them mean "does not run"
        logger.debug("%s cannot be run", artifact, exc_info=True)
        problems.append(f"it cannot be run: {type(error).__name__}: {error}")
        return Parity(artifact, None, limit, tuple(shapes), tuple(problems))
    if not worst <= limit:  # NaN fails too
        problems.append(f"its outputs differ from torch's by {worst:.2g}, more than {limit:.2g}")
    return Parity(artifact, worst, limit, tuple(shapes), tuple(problems))


def _batches(graph: EncoderGraph) -> Iterator[dict[str, Tensor]]:
    """One token, sequences of several lengths side by side, and one as long as there is room for,
    up to LONGEST; tokens are drawn from the whole vocabulary."""
    dice = torch.Generator().manual_seed(0)
    rows = rows_of(graph.model)
    padding = int(getattr(graph.model.config, "pad_token_id", None) or 0)
    longest = min(graph.context, LONGEST)
    shapes = [shape for shape in SHAPES if shape[1] < longest]
    for B, L in (*shapes, (1, longest)):
        tokens_BL = torch.randint(rows, (B, L), generator=dice)
        tokens_BL[tokens_BL == padding] = rows - 1
        length_B1 = torch.tensor([[max(1, L - 5 * row)] for row in range(B)])
        mask_BL = torch.arange(L) < length_B1
        inputs = {
            "input_ids": tokens_BL.where(mask_BL, padding),
            "attention_mask": mask_BL.long(),
            "token_type_ids": torch.zeros_like(tokens_BL),
        }
        yield {name: inputs[name] for name in graph.inputs}


@torch.no_grad()
def _differences(
    encoder: Encoder, inputs: dict[str, Tensor], made: Sequence[Tensor]
) -> Iterator[float]:
    """Of each output; what stands at padding means nothing."""
    mask_BL = inputs["attention_mask"].bool()
    said = encoder.model(**inputs)
    for name, ours in zip(outputs_of(type(encoder.model).__name__), made, strict=True):
        theirs = said[name]
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} is {tuple(ours.shape)}, and torch's {tuple(theirs.shape)}")
        if theirs.shape[:2] == mask_BL.shape and _of_tokens(encoder, name):
            ours, theirs = ours[mask_BL], theirs[mask_BL]
        gap = (ours - theirs).norm() / theirs.norm().clamp_min(1e-12)
        yield float("inf") if gap.isnan() else float(gap)


def _of_tokens(encoder: Encoder, name: str) -> bool:
    """Whether an output has one answer per token; otherwise it has one per sequence."""
    return name != "logits" or "SequenceClassification" not in type(encoder.model).__name__


def write_report(out: Path, parities: Iterable[Parity]) -> None:
    """Add these figures to reports/verify.json, keeping those of other artifacts."""
    file = out / REPORT
    report = read_json(file, advice="remove it") if file.is_file() else {}
    artifacts = report.get("artifacts", {}) | {p.artifact: p.as_dict() for p in parities}
    write_json(file, {"environment": manifest.environment(), "artifacts": artifacts})
