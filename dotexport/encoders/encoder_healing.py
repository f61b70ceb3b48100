"""Short distillation of a narrowed encoder: last hidden states and embeddings of the original.

The loss is |h - h'|^2 over its own mean for the original, plus 1 - cos of the embeddings. Both
read the same sentences, each in its own tokens: of a smaller vocabulary, hidden states are compared
in sentences that both read alike, embeddings in all of them.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.sentences import Batch, pooled

RATE, WARM_UP = 3e-4, 0.1
COSINE_WEIGHT = 10.0

Lesson = tuple[Batch, Batch]
"""The same sentences as the narrower model reads them, and as the original does."""


def heal(
    original: Encoder,
    model: nn.Module,
    lessons: Sequence[Lesson],
    judge: Callable[[nn.Module], float],
    pooling: str,
    steps: int,
    *,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> nn.Module:
    """The distilled model; the one that went in where `judge` says more of that."""
    student = copy.deepcopy(model)
    base: nn.Module = student.base_model  # type: ignore[assignment]
    learning = _learning(original, base)
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = random.Random(seed)
    for step in range(steps):
        progress("distilling", step, steps)
        read, their_read = order.choice(lessons)
        with torch.no_grad():
            wanted = original.base(**their_read.inputs).last_hidden_state
        hidden = base(**read.inputs).last_hidden_state
        loss = _loss(hidden, wanted, read.mask, their_read.mask, pooling)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    progress("distilling", steps, steps)
    return student if judge(student) > judge(model) else model


def _learning(original: Encoder, base: nn.Module) -> list[nn.Parameter]:
    """Of the layers."""
    return list(base.get_submodule(original.kind.stack).parameters())


def _rate(step: int, steps: int) -> float:
    """Up, then down along half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(
    hidden_NLD: Tensor, wanted_NMD: Tensor, mask_NL: Tensor, wanted_mask_NM: Tensor, pooling: str
) -> Tensor:
    """Args: wanted_NMD: of as many sentences, of M tokens each, which `wanted_mask_NM` has."""
    ours_ND = pooled(hidden_NLD, mask_NL, pooling)
    theirs_ND = pooled(wanted_NMD, wanted_mask_NM, pooling)
    turned = (1 - (ours_ND * theirs_ND).sum(-1)).mean()
    alike_N1 = (mask_NL.sum(-1) == wanted_mask_NM.sum(-1))[:, None]
    if not alike_N1.any():
        return COSINE_WEIGHT * turned
    gap = (hidden_NLD[mask_NL & alike_N1] - wanted_NMD[wanted_mask_NM & alike_N1]).square().mean()
    energy = wanted_NMD[wanted_mask_NM].square().mean()
    return gap / energy + COSINE_WEIGHT * turned
