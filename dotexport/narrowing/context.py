"""How much of what the original predicts it owes to text further back, token by token.

Most predictions need the last few words only, and a mean over all tokens hears little of the
others. But these are what a task asks for: a name from the page before, the subject of a question.
A cut in depth may cost less than one in width on the mean, and more where context counts
(docs/log.md). So what chooses layers and sizes counts a token by one half, and by another half as
its prediction owes to context.

Shapes: N windows, L tokens per window, T tokens, B blocks of S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from dotexport.models.beside import Beside
from dotexport.narrowing.judging import JUDGED_AT_ONCE, Head
from dotexport.narrowing.original import Original

BLOCK = 32  # tokens that are read alone; the second half of them is asked
LEAST = 1e-3  # nats that are owed on the mean; less is rounding
AT_ONCE = 64  # windows, or blocks, that walk through a layer together


@torch.no_grad()
def context_weights(original: Original, windows_NL: Tensor) -> Tensor:
    """(N, L), mean 1: one half, and half of KL(p || q) over its mean, where p predicts from all of
    the window and q from the 16 to 31 tokens before alone.

    The same for all where nothing is owed to context, as in windows that are no longer than that.
    """
    half = BLOCK // 2
    count, length = windows_NL.shape
    starts = range(0, length - BLOCK + 1, half)
    weights_NL = torch.ones(count, length)
    if len(starts) < 2 or not count:
        return weights_NL
    tokens_BS = windows_NL.unfold(1, BLOCK, half).reshape(-1, BLOCK)
    whole_NLD, alone_BSD = _last_streams(original, [windows_NL, tokens_BS])
    end = starts[-1] + BLOCK
    asked_TD = whole_NLD[:, half:end].flatten(0, 1)
    owed_T = _apart(
        Head(original.stock, original.folded_head()), asked_TD, alone_BSD[:, half:].flatten(0, 1)
    )
    mean = owed_T.mean()
    if mean > LEAST:
        weights_NL[:, half:end] = (0.5 + 0.5 * owed_T / mean).view(count, -1)
    return weights_NL


def _last_streams(original: Original, texts: list[Tensor]) -> list[Tensor]:
    """What the head reads of each text, a layer at a time for all of them."""
    table_VD = original.embedding()
    streams = [table_VD[text.to(original.device)] for text in texts]
    beside = [Beside(text, original.inputs(table_VD, text)) for text in texts]
    for number in range(original.sizes.num_layers):
        through = original.layer(number).through
        for stream, given in zip(streams, beside, strict=True):
            for start in range(0, len(stream), AT_ONCE):
                rows = slice(start, start + AT_ONCE)
                stream[rows] = given.passed(through, stream, rows, stream.device)
    return streams


def _apart(head: Head, whole_TD: Tensor, alone_TD: Tensor) -> Tensor:
    """KL of what is said with context from what is said without, per token."""
    found = []
    for start in range(0, len(whole_TD), JUDGED_AT_ONCE):
        some = slice(start, start + JUDGED_AT_ONCE)
        with_TV, without_TV = (
            log_softmax(head.logits(part_TD[some]), -1) for part_TD in (whole_TD, alone_TD)
        )
        kl_TV = kl_div(without_TV, with_TV, reduction="none", log_target=True)
        found.append(kl_TV.sum(-1).clamp_min(0.0).cpu())
    return torch.cat(found)
