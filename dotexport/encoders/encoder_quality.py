"""What narrowing cost an encoder: embeddings, neighbours, and answers of a task head.

Shapes: N sentences, D width of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotexport.encoders import encoder_card
from dotexport.encoders.encoder_folder import Encoder, open_encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.encoder_verifying import graph_of, named
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.kinds import outputs_of
from dotexport.encoders.labelled import HIDDEN, Said, Say, scores
from dotexport.encoders.pooling import mean_cosine, pooling_of, width_of
from dotexport.encoders.rows import read_rows
from dotexport.encoders.sentences import Batch, read_by_both, read_sentences
from dotexport.errors import UsageError
from dotexport.exports.encoder_target import EncoderTarget, resolve_encoder
from dotexport.models.text_windows import read_tokenizer
from dotexport.storage import manifest
from dotexport.storage.files import write_json

NEIGHBOURS = 10


def evaluate(
    narrowed: Path,
    original: Path,
    options: SentenceOptions,
    *,
    spec: str | None = None,
    labelled: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Figures of a narrowed model beside the original on the same sentences.

    Args:
        labelled: rows with answers, which both are asked (see `rows.read_rows`).
        spec: an artifact of the narrowed one, which answers in its own runtime; None: torch does.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, RuntimeMissingError.
        UsageError: models of different classes, or no such artifact.
    """
    theirs, ours = open_encoder(original), open_encoder(narrowed)
    if type(theirs.model) is not type(ours.model):
        raise UsageError(
            f"{narrowed} is a {type(ours.model).__name__} and {original} a "
            f"{type(theirs.model).__name__}; give the original of this output"
        )
    said, wanted = _of_torch(ours), _of_torch(theirs)
    if spec is not None:
        said = _of_artifact(ours, narrowed, spec)
    told: dict[str, Any] = {}
    if labelled:
        rows = read_rows(labelled)
        sides = {"narrowed": (ours, said), "original": (theirs, wanted)}
        right = {name: scores(*side, rows, options, progress) for name, side in sides.items()}
        told["labelled"] = {"file": str(labelled), "rows": len(rows), **right}
    return compare(ours, theirs, said, options, progress) | told


def compare(
    ours: Encoder,
    theirs: Encoder,
    said: Say,
    options: SentenceOptions,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """What is said of sentences in the tokens of `ours`, beside what the original says in torch.

    Raises:
        CalibrationError: too few sentences.
        UnsupportedModelError: a pooling that is not known here.
        UsageError: embeddings of two widths, and no head that says anything else.
    """
    wanted = _of_torch(theirs)
    our_pooling, pooling = pooling_of(ours), pooling_of(theirs)
    widths = width_of(ours), width_of(theirs)
    if ours.model is ours.base and len(set(widths)) > 1:
        raise UsageError(
            f"{ours.home} makes embeddings of {widths[0]} values and {theirs.home} of {widths[1]}, "
            "which cannot stand beside each other; give the original of this output"
        )
    sentences = read_sentences(options)
    pairs = read_by_both(ours, theirs, sentences, options)
    embeddings, answers = [], _Answers(ours, theirs)
    for number, (read, their_read) in enumerate(pairs):
        progress("evaluating", number, len(pairs))
        made, expected = said(read), wanted(their_read)
        if HIDDEN in made:
            both = ((our_pooling, made, read), (pooling, expected, their_read))
            embeddings.append([pool(found[HIDDEN], one.mask) for pool, found, one in both])
        answers.add(read, their_read, made, expected)
    progress("evaluating", len(pairs), len(pairs))
    return {
        **_closeness(embeddings),
        **answers.as_dict(),
        "sentences": len(sentences),
        "pooling": pooling.mode,
        "text": options.source,
    }


def _of_torch(encoder: Encoder) -> Say:
    """The stock model, and what its last layer says."""

    @torch.no_grad()
    def say(read: Batch) -> Said:
        made = encoder.model(**read.inputs)
        known = {name: made[name] for name in outputs_of(type(encoder.model).__name__)}
        if HIDDEN not in known:
            known[HIDDEN] = encoder.base(**read.inputs).last_hidden_state
        return known

    return say


def _of_artifact(encoder: Encoder, out: Path, spec: str) -> Say:
    """What an artifact of an output answers in its own runtime."""
    listed = manifest.read(out)["artifacts"]
    name = named(spec, listed, out)
    target, _ = resolve_encoder(f"{listed[name]['target']}:{listed[name]['precision']}")
    manifest.require_unchanged(out / name)
    return said_by(encoder, target, out / name / encoder.home.relative_to(encoder.root))


def said_by(encoder: Encoder, target: EncoderTarget, folder: Path) -> Say:
    """What an artifact answers in its own runtime; `folder` is where its config.json lies."""
    session = target.open_encoder(folder)
    inputs, outputs = graph_of(encoder).inputs, outputs_of(type(encoder.model).__name__)

    def say(read: Batch) -> Said:
        given = {"token_type_ids": torch.zeros_like(read.inputs["input_ids"]), **read.inputs}
        arrays = {name: given[name].numpy() for name in inputs}
        return dict(zip(outputs, map(torch.from_numpy, session(arrays)), strict=True))

    return say


def _closeness(embeddings: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Nothing of a head's artifact, which does not say them; no cosine behind a narrower stream
    that nothing maps back, as a head reads it."""
    if not embeddings:
        return {}
    ours_ND, theirs_ND = (torch.cat(side) for side in zip(*embeddings, strict=True))
    near = {"recall_at_10": recall(ours_ND, theirs_ND)}
    if ours_ND.shape != theirs_ND.shape:
        return near
    return {"cosine": mean_cosine(ours_ND, theirs_ND)} | near


def recall(ours_ND: Tensor, theirs_ND: Tensor, count: int = NEIGHBOURS) -> float:
    """Share of the original's nearest sentences that are among the narrowed model's nearest.

    >>> recall(torch.eye(3), torch.eye(3), 2)
    1.0
    """
    count = min(count, len(ours_ND) - 1)
    near = []
    for embeddings_ND in (ours_ND, theirs_ND):
        alike_NN = embeddings_ND @ embeddings_ND.T
        near.append(alike_NN.fill_diagonal_(-2.0).topk(count).indices)
    shared_NKK = near[0][:, :, None] == near[1][:, None, :]
    return float(shared_NKK.any(-1).float().mean())


class _Answers:
    """Agreement and KL(original || narrowed) of class probabilities, in nats; nothing without a
    task head. Answers about tokens are compared in sentences of which both read the same ones."""

    def __init__(self, ours: Encoder, theirs: Encoder) -> None:
        self.rows, self.their_rows = _shared_rows(ours, theirs)
        self.is_over_tokens = type(ours.model).__name__.endswith("ForMaskedLM")
        self.same, self.divergence, self.count = 0.0, 0.0, 0

    def add(self, read: Batch, their_read: Batch, made: Said, wanted: Said) -> None:
        alike_N, mask_NL = _read_alike(read, their_read, self.rows, self.their_rows)
        for name in wanted.keys() - {HIDDEN}:
            logits, expected = made[name], wanted[name]
            if name != "logits" or expected.ndim == 3:  # of tokens, not of sentences
                logits, expected = (x[alike_N, : mask_NL.shape[1]] for x in (logits, expected))
                if name == "logits":
                    logits, expected = logits[mask_NL], expected[mask_NL]
                else:  # positions: padding is none
                    logits, expected = (x.masked_fill(~mask_NL, -1e9) for x in (logits, expected))
            if self.is_over_tokens:
                logits, expected = logits[:, self.rows], expected[:, self.their_rows]
            log_ours, log_theirs = logits.log_softmax(-1), expected.log_softmax(-1)
            self.divergence += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            self.same += float((logits.argmax(-1) == expected.argmax(-1)).sum())
            self.count += len(logits)

    def as_dict(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {"agreement": self.same / self.count, "kl": self.divergence / self.count}


def _shared_rows(ours: Encoder, theirs: Encoder) -> tuple[Tensor, Tensor]:
    """Rows of either table that are the same token."""
    if ours.num_tokens == theirs.num_tokens:
        rows = torch.arange(ours.num_tokens)
        return rows, rows
    vocabularies = (read_tokenizer(one.home).get_vocab() for one in (ours, theirs))
    known, all_known = vocabularies
    found = [(known[token], row) for token, row in all_known.items() if token in known]
    both_R2 = torch.tensor(found)
    return both_R2[:, 0], both_R2[:, 1]


def _read_alike(
    read: Batch, their_read: Batch, rows: Tensor, their_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sentences of which both read the same tokens, and where these sentences have tokens."""
    same = torch.full((int(max(rows.max(), read.inputs["input_ids"].max())) + 1,), -1)
    same[rows] = their_rows
    length = min(read.mask.shape[1], their_read.mask.shape[1])
    mask_NL = read.mask[:, :length]
    tokens_NL = same[read.inputs["input_ids"][:, :length]]
    equal_NL = (tokens_NL == their_read.inputs["input_ids"][:, :length]) | ~mask_NL
    alike_N = equal_NL.all(-1) & (read.mask.sum(-1) == their_read.mask.sum(-1))
    return alike_N, mask_NL[alike_N]


def evaluate_into(
    out: Path,
    baseline: Path,
    options: SentenceOptions,
    *,
    spec: str | None = None,
    labelled: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Evaluate an output beside the original, and record it there."""
    listed = manifest.read(out)["artifacts"]  # refuses what is no output
    record = evaluate(out, baseline, options, spec=spec, labelled=labelled, progress=progress)
    if spec is None:
        manifest.update(out, quality=record)
        write_json(out / "reports/quality.json", record)
    else:
        name = named(spec, listed, out)
        manifest.merge(out, artifact_quality={name: record})
        write_json(out / f"reports/quality-{name}.json", record)
    if "shrink" in manifest.read(out):
        encoder_card.write(out)
    return record
