"""What healing minimises: how far a narrowed model is from its original on the same tokens.

Forward KL divergence of the predictions, and the distance between the two residual streams in the
basis that narrowed one into the other. Both are 0 for the original itself.

Shapes: B windows, L tokens of one, C = B * L predictions, D width before, K width after,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20  # of one chunk's log-probabilities; a few of these exist at a time

Streams = list[Tensor]


def divergence(ours_CV: Tensor, theirs_CV: Tensor) -> Tensor:
    """Mean over predictions of KL(theirs || ours), in nats, from logits.

    The log-probabilities exist a chunk at a time, in the backward pass too: with a large vocabulary
    they, and not the layers, would decide how much memory a step takes.
    """
    rows = max(1, CHUNK_BYTES // (4 * ours_CV.shape[-1]))
    chunks = zip(torch.split(ours_CV, rows), torch.split(theirs_CV, rows), strict=True)
    if len(ours_CV) <= rows:
        total = _summed_divergence(ours_CV, theirs_CV)
    else:
        pieces = [checkpoint(_summed_divergence, *chunk, use_reentrant=False) for chunk in chunks]
        total = torch.stack(pieces).sum()
    return total / len(ours_CV)


def _summed_divergence(ours_CV: Tensor, theirs_CV: Tensor) -> Tensor:
    ours_CV, theirs_CV = log_softmax(ours_CV.float(), -1), log_softmax(theirs_CV.float(), -1)
    return kl_div(ours_CV, theirs_CV, reduction="sum", log_target=True)


def stream_distance(ours: Streams, theirs: Streams, E_DK: Tensor) -> Tensor:
    """Mean over layers and tokens of |s - E^T x|^2 / |E^T x|^2, s our stream and x theirs.

    Relative token by token: the next norm divides by its length, and in a plain sum the few
    positions with massive activations would be all that counts.
    """
    errors = []
    for s_BLK, x_BLD in zip(ours, theirs, strict=True):
        target_BLK = x_BLD.float() @ E_DK
        gap_BL = (s_BLK.float() - target_BLK).square().sum(-1)
        errors.append((gap_BL / target_BLK.square().sum(-1).clamp_min(1e-12)).mean())
    return torch.stack(errors).mean()


def distillation_loss(
    student: Any,
    teacher: Any,
    E_DK: Tensor,
    tokens_BL: Tensor,
    *,
    hidden_weight: float,
    behind: Sequence[int] | None = None,
) -> Tensor:
    """KL of the predictions + hidden_weight * distance of the residual streams behind each layer.

    The student's gradient flows; the teacher is only read, and its logits live for this batch.

    Args:
        behind: the teacher's layer that each of the student's answers for; None: its own number.
    """
    with torch.no_grad():
        theirs_CV, their_streams = predict(teacher, tokens_BL)
    their_streams = [their_streams[n] for n in behind or range(len(their_streams))]
    ours_CV, our_streams = predict(student, tokens_BL)
    loss = divergence(ours_CV, theirs_CV)
    if hidden_weight:
        loss = loss + hidden_weight * stream_distance(our_streams, their_streams, E_DK)
    return loss


def predict(model: Any, tokens_BL: Tensor) -> tuple[Tensor, Streams]:
    """Logits (C, V) of a stock model, and its residual stream (B, L, width) behind each layer."""
    streams: Streams = []
    with recorded(model, streams):
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    return logits_BLV.flatten(0, 1), streams


@contextmanager
def recorded(model: Any, streams: Streams) -> Iterator[None]:
    """Append what each decoder layer gives to `streams`, for as long as the block lasts."""

    def keep(module: Any, inputs: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
