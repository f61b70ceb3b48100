"""What narrowing cost an encoder: embeddings, neighbours, and answers of a task head.

Shapes: N sentences, D width of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.encoders import encoder_card
from dotexport.encoders.encoder_folder import open_encoder
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
    some = batches(theirs, sentences, options)
    ours_ND, theirs_ND = (embed(one.base, some, pooling) for one in (ours, theirs))
    return {
        "cosine": mean_cosine(ours_ND, theirs_ND),
        "recall_at_10": recall(ours_ND, theirs_ND),
        **_answers(ours.model, theirs.model, some),
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


@torch.no_grad()
def _answers(ours: nn.Module, theirs: nn.Module, some: Sequence[Batch]) -> dict[str, float]:
    """Agreement and KL(original || narrowed) of class probabilities, in nats; nothing without a
    task head."""
    same, divergence, count = 0.0, 0.0, 0
    for batch in some:
        made, wanted = ours(**batch.inputs), theirs(**batch.inputs)
        for name in OUTPUTS:
            if getattr(wanted, name, None) is None:
                continue
            logits, expected = getattr(made, name), getattr(wanted, name)
            if name == "logits" and expected.ndim == 3:  # of tokens, not of sentences
                logits, expected = logits[batch.mask], expected[batch.mask]
            elif name != "logits":  # positions: padding is none
                logits, expected = (x.masked_fill(~batch.mask, -1e9) for x in (logits, expected))
            log_ours, log_theirs = logits.log_softmax(-1), expected.log_softmax(-1)
            divergence += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            same += float((logits.argmax(-1) == expected.argmax(-1)).sum())
            count += len(logits)
    return {"agreement": same / count, "kl": divergence / count} if count else {}


def evaluate_into(out: Path, baseline: Path, options: SentenceOptions) -> dict[str, Any]:
    """Evaluate an output beside the original, and record it there."""
    manifest.read(out)  # refuses what is no output
    record = evaluate(out, baseline, options)
    manifest.update(out, quality=record)
    write_json(out / "reports" / "quality.json", record)
    if "shrink" in manifest.read(out):
        encoder_card.write(out)
    return record
