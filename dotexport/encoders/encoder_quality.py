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
from dotexport.encoders.sentences import (
    Batch,
    batches,
    embed,
    mean_cosine,
    pooling_of,
    read_sentences,
)
from dotexport.errors import UsageError
from dotexport.models.text_windows import read_tokenizer
from dotexport.storage import manifest
from dotexport.storage.files import write_json

NEIGHBOURS = 10
OUTPUTS = ("logits", "start_logits", "end_logits")


def evaluate(narrowed: Path, original: Path, options: SentenceOptions) -> dict[str, Any]:
    """Figures of a narrowed model beside the original on the same sentences.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError.
        UsageError: models of different classes.
    """
    theirs, ours = open_encoder(original), open_encoder(narrowed)
    if type(theirs.model) is not type(ours.model):
        raise UsageError(
            f"{narrowed} is a {type(ours.model).__name__} and {original} a "
            f"{type(theirs.model).__name__}; give the original of this output"
        )
    pooling = pooling_of(theirs)
    sentences = read_sentences(options)
    pairs = _read_by_both(ours, theirs, sentences, options)
    ours_ND = embed(ours.base, [one for one, _ in pairs], pooling)
    theirs_ND = embed(theirs.base, [one for _, one in pairs], pooling)
    return {
        "cosine": mean_cosine(ours_ND, theirs_ND),
        "recall_at_10": recall(ours_ND, theirs_ND),
        **_answers(ours, theirs, pairs),
        "sentences": len(sentences),
        "pooling": pooling,
        "text": options.source,
    }


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


def _read_by_both(
    ours: Encoder, theirs: Encoder, sentences: list[str], options: SentenceOptions
) -> list[tuple[Batch, Batch]]:
    """The same sentences in the tokens of each, which may be fewer than the original's."""
    read = (batches(one, sentences, options) for one in (ours, theirs))
    return list(zip(*read, strict=True))


@torch.no_grad()
def _answers(
    ours: Encoder, theirs: Encoder, pairs: Sequence[tuple[Batch, Batch]]
) -> dict[str, float]:
    """Agreement and KL(original || narrowed) of class probabilities, in nats; nothing without a
    task head. Answers about tokens are compared in sentences of which both read the same ones."""
    same, divergence, count = 0.0, 0.0, 0
    rows, their_rows = _shared_rows(ours, theirs)
    is_over_tokens = type(ours.model).__name__.endswith("ForMaskedLM")
    for read, their_read in pairs:
        made, wanted = ours.model(**read.inputs), theirs.model(**their_read.inputs)
        alike_N, mask_NL = _read_alike(read, their_read, rows, their_rows)
        for name in OUTPUTS:
            if getattr(wanted, name, None) is None:
                continue
            logits, expected = getattr(made, name), getattr(wanted, name)
            if name != "logits" or expected.ndim == 3:  # of tokens, not of sentences
                logits, expected = (x[alike_N, : mask_NL.shape[1]] for x in (logits, expected))
                if name == "logits":
                    logits, expected = logits[mask_NL], expected[mask_NL]
                else:  # positions: padding is none
                    logits, expected = (x.masked_fill(~mask_NL, -1e9) for x in (logits, expected))
            if is_over_tokens:
                logits, expected = logits[:, rows], expected[:, their_rows]
            log_ours, log_theirs = logits.log_softmax(-1), expected.log_softmax(-1)
            divergence += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            same += float((logits.argmax(-1) == expected.argmax(-1)).sum())
            count += len(logits)
    return {"agreement": same / count, "kl": divergence / count} if count else {}


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


def evaluate_into(out: Path, baseline: Path, options: SentenceOptions) -> dict[str, Any]:
    """Evaluate an output beside the original, and record it there."""
    manifest.read(out)  # refuses what is no output
    record = evaluate(out, baseline, options)
    manifest.update(out, quality=record)
    write_json(out / "reports" / "quality.json", record)
    if "shrink" in manifest.read(out):
        encoder_card.write(out)
    return record
