"""Speed of text encoders: one call on a batch of sentences, original and narrowed in turns
(A B B A) in this process.

Both lie in memory at once, in the same runtime with the same threads.

Shapes: B sentences of a batch, L tokens of each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dotexport.app.turn_options import TurnOptions
from dotexport.encoders import encoder_card
from dotexport.encoders.encoder_exporting import write_artifact
from dotexport.encoders.encoder_folder import Encoder, open_encoder
from dotexport.encoders.encoder_verifying import graph_of
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.sentences import context_of
from dotexport.errors import UsageError
from dotexport.exports.encoder_target import resolve_encoder
from dotexport.exports.verifying import artifact_name
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import folder_bytes

from .turns import Call, in_turns, torch_threads

TORCH = "torch"
SIDES = ("baseline", "candidate")


@dataclass(frozen=True)
class Subject:
    """One encoder, ready to be timed; and the bytes of what is deployed."""

    call: Call
    num_bytes: int


def bench_encoder(
    candidate: Path,
    baseline: Path,
    target: str,
    options: TurnOptions | None = None,
    *,
    batch: int = 1,
    seqlen: int = 128,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare an output with the original and record it in its manifest, card and reports.

    Raises:
        UsageError: a target that holds no encoders, or sentences longer than the context.
        CheckpointError, RuntimeMissingError, ParityError.
    """
    options = options or TurnOptions()
    manifest.read(candidate)  # refuses what is no output
    with ExitStack() as stack:
        stack.enter_context(torch_threads(options.threads))
        subjects = [
            stack.enter_context(_subject(folder, target, batch, seqlen, options.threads))
            for folder in (baseline, candidate)
        ]
        shape = f"{batch} x {seqlen} tokens"
        calls = [subject.call for subject in subjects]
        times = in_turns(calls, options, shape, progress)
    record = {
        "target": target,
        "threads": options.threads,
        "batch": batch,
        "seqlen": seqlen,
        "call": times,
        "sentences_per_second": [1e3 * batch / times[f"{side}_ms"] for side in SIDES],
        "bytes": [subject.num_bytes for subject in subjects],
        "environment": manifest.environment(),
    }
    _record(candidate, record)
    return record


@contextmanager
def _subject(folder: Path, target: str, batch: int, seqlen: int, threads: int) -> Iterator[Subject]:
    encoder = open_encoder(folder)
    manifest.require_unchanged(encoder.root)
    check_length(encoder, seqlen)
    inputs = full_rows(encoder, batch, seqlen)
    if target == TORCH:

        def call() -> object:
            with torch.no_grad():
                return encoder.model(**inputs)

        yield Subject(call, folder_bytes(encoder.root))
        return
    with _artifact(encoder, folder, target) as artifact:
        session = resolve_encoder(target)[0].open_encoder(
            artifact / encoder.home.relative_to(encoder.root), threads=threads
        )
        arrays = {name: value.numpy() for name, value in inputs.items()}
        yield Subject(lambda: session(arrays), folder_bytes(artifact))


def check_length(encoder: Encoder, seqlen: int) -> None:
    """Refuse rows that are longer than what an encoder reads."""
    if seqlen > (most := context_of(encoder)):
        raise UsageError(
            f"--seqlen {seqlen} is more than the {most} tokens that {encoder.root} reads"
        )


def full_rows(encoder: Encoder, batch: int, seqlen: int) -> dict[str, torch.Tensor]:
    """Full rows of any tokens: time does not depend on which."""
    dice = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(encoder.num_tokens, (batch, seqlen), generator=dice)
    known = {
        "input_ids": tokens_BL,
        "attention_mask": torch.ones_like(tokens_BL),
        "token_type_ids": torch.zeros_like(tokens_BL),
    }
    return {name: known[name] for name in graph_of(encoder).inputs}


@contextmanager
def _artifact(encoder: Encoder, folder: Path, spec: str) -> Iterator[Path]:
    """The artifact of an output, or one made for the while."""
    target, precision = resolve_encoder(spec)
    made = folder / artifact_name(target, precision)
    if made.is_dir():
        manifest.require_unchanged(made)
        yield made
        return
    with tempfile.TemporaryDirectory(prefix="dotexport-") as scratch:
        write_artifact(target, encoder, Path(scratch), made.name, precision)
        yield Path(scratch)


def _record(out: Path, record: dict[str, Any]) -> None:
    name = f"{record['target'].replace(':', '-')}-{record['batch']}x{record['seqlen']}"
    write_json(out / "reports" / f"bench-{name}.json", record)
    words = (
        f"{record['target']}, {record['batch']} x {record['seqlen']} tokens, "
        f"{record['threads']} threads"
    )
    headline = {key: value for key, value in record["call"].items() if key != "samples_ms"}
    manifest.merge(out, bench={words: headline}, bench_bytes={record["target"]: record["bytes"]})
    if "shrink" in manifest.read(out):
        encoder_card.write(out)
