"""Short distillation of a narrowed encoder: last hidden states and embeddings of the original.

The loss is |h - h'|^2 over its own mean for the original, plus 1 - cos of the embeddings; layers
learn, embedding tables stay.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.encoder_walk import Progress
from dotexport.encoders.sentences import Batch, embed, mean_cosine, pooled

RATE, WARM_UP = 3e-4, 0.1
COSINE_WEIGHT = 10.0


def heal(
    encoder: Encoder,
    model: nn.Module,
    some: Sequence[Batch],
    judges: Sequence[Batch],
    pooling: str,
    steps: int,
    *,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> nn.Module:
    """The distilled model; the one that went in where sentences that judge prefer that."""
    student = copy.deepcopy(model)
    base: nn.Module = student.base_model  # type: ignore[assignment]
    learning = list(base.get_submodule(encoder.kind.stack).parameters())
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = random.Random(seed)
    for step in range(steps):
        progress("distilling", step, steps)
        batch = order.choice(some)
        with torch.no_grad():
            wanted = encoder.base(**batch.inputs).last_hidden_state
        loss = _loss(base(**batch.inputs).last_hidden_state, wanted, batch, pooling)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    progress("distilling", steps, steps)
    wanted_ND = embed(encoder.base, judges, pooling)
    original: nn.Module = model.base_model  # type: ignore[assignment]
    before = mean_cosine(embed(original, judges, pooling), wanted_ND)
    return student if mean_cosine(embed(base, judges, pooling), wanted_ND) > before else model


def _rate(step: int, steps: int) -> float:
    """Up, then down along half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(hidden_NLD: Tensor, wanted_NLD: Tensor, batch: Batch, pooling: str) -> Tensor:
    mask_NL = batch.mask
    gap = (hidden_NLD - wanted_NLD)[mask_NL].square().mean()
    energy = wanted_NLD[mask_NL].square().mean()
    ours, theirs = (pooled(h, mask_NL, pooling) for h in (hidden_NLD, wanted_NLD))
    return gap / energy + COSINE_WEIGHT * (1 - (ours * theirs).sum(-1)).mean()
