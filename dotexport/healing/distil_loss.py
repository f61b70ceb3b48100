"""What healing minimises: how far a narrowed model is from its original on the same tokens.

Forward KL divergence of the predictions, and the distance between the two residual streams in the
basis that narrowed one into the other. Both are 0 for the original itself, unless tokens left.

Shapes: B windows, L tokens of one, C = B * L predictions, D width before, K width after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dotexport.healing.distil_head import Given, Head, divergence
from dotexport.vocabulary.joining import END, Spellings

Streams = list[Tensor]

Reads = Callable[..., tuple[Tensor, Streams]]
"""As `read`."""


def stream_distance(
    ours: Streams, theirs: Streams, E_DK: Tensor, counted_BL: Tensor | None = None
) -> Tensor:
    """Mean over layers and tokens of |s - E^T x|^2 / |E^T x|^2, s our stream and x theirs.

    Relative token by token: the next norm divides by its length, and in a plain sum the few
    positions with massive activations would be all that counts.

    Args:
        counted_BL: tokens whose distance counts, at most as 1, and others have none; None: all.
            Where both read other tokens, a massive activation of one may be none of the other, and
            such a distance, dozens of times the stream's length, would be all that steps follow.
    """
    errors = []
    for s_BLK, x_BLD in zip(ours, theirs, strict=True):
        target_BLK = x_BLD.to(E_DK.dtype) @ E_DK
        # Summed in float32, whatever the streams are in.
        gap_BL = (s_BLK.to(E_DK.dtype) - target_BLK).square().sum(-1, dtype=torch.float32)
        size_BL = target_BLK.square().sum(-1, dtype=torch.float32)
        error_BL = gap_BL / size_BL.clamp_min(1e-12)
        if counted_BL is not None:
            error_BL = error_BL.clamp(max=1) * counted_BL
        errors.append(error_BL.mean())
    return torch.stack(errors).mean()


def distillation_loss(
    student: Any,
    teacher: Any,
    E_DK: Tensor,
    tokens_BL: Tensor,
    *,
    hidden_weight: float,
    behind: Sequence[int] | None = None,
    reads: Reads | None = None,
    spellings: Spellings | None = None,
) -> Tensor:
    """KL of the predictions + hidden_weight * distance of the residual streams behind each layer.

    The student's gradient flows; the teacher is only read.

    Args:
        behind: the teacher's layer that each of the student's answers for; None: its own number.
        reads: asks either for its states; None: `read`.
        spellings: of the teacher's tokens that the student does not have; None: it has them all.
    """
    reads = reads or read
    joined = spellings.joined(tokens_BL) if spellings else None
    with torch.no_grad():
        theirs_CD, their_streams = reads(
            teacher, tokens_BL if joined is None else joined.ids_BL, streams=bool(hidden_weight)
        )
    given = counted_BL = None
    if spellings and joined:
        theirs_CD = theirs_CD[joined.at_C]
        given = Given(spellings, joined.given_C)
        their_streams = [joined.placed(stream_BLD) for stream_BLD in their_streams]
        counted_BL = (joined.given_C == END).reshape(tokens_BL.shape).to(tokens_BL.device)
    ours_CK, our_streams = reads(student, tokens_BL, streams=bool(hidden_weight))
    loss = divergence(ours_CK, theirs_CD, Head.of(student), Head.of(teacher), given)
    if hidden_weight:
        their_streams = [their_streams[n] for n in behind or range(len(their_streams))]
        loss = loss + hidden_weight * stream_distance(our_streams, their_streams, E_DK, counted_BL)
    return loss


def read(model: Any, tokens_BL: Tensor, *, streams: bool) -> tuple[Tensor, Streams]:
    """Hidden states (C, width) that the head of a stock model takes, and where they are asked for
    its residual stream (B, L, width) behind each layer."""
    found: Streams = []
    with recorded(model, found, on=streams):
        hidden_BLK = model.get_decoder()(input_ids=tokens_BL, use_cache=False).last_hidden_state
    return hidden_BLK.flatten(0, 1), found


@contextmanager
def recorded(model: Any, streams: Streams, *, on: bool = True) -> Iterator[None]:
    """Append what each decoder layer gives to `streams`, for as long as the block lasts."""

    def keep(module: Any, inputs: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    layers = model.get_decoder().layers if on else ()
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
