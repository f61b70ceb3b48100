"""Short distillation of a narrowed encoder: last hidden states, embeddings and answers of the
original.

The loss is |h - h'|^2 over its own mean for the original, plus ten times 1 - cos of the embeddings,
plus KL(original || narrowed) of what a head for sequences, tokens or questions answers. Both read
the same sentences, each in its own tokens: with fewer tokens, what is said of each token is
compared in sentences that both read in as many.
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
from dotexport.encoders.kinds import outputs_of
from dotexport.encoders.labelled import HIDDEN, Said
from dotexport.encoders.pooling import Pooling
from dotexport.encoders.sentences import Batch
from dotexport.healing.heal_options import rate_by_width

MOST_RATE, WARM_UP = 3e-4, 0.1
COSINE_WEIGHT = 10.0

Student = tuple[nn.Module, nn.Linear | None]
"""A narrowed model, and what takes its stream back to the original's width, if it is narrower."""
Lesson = tuple[Batch, Batch]
"""The same sentences as the narrower model reads them, and as the original does."""


def heal(
    original: Encoder,
    narrowed: Student,
    lessons: Sequence[Lesson],
    judge: Callable[[Student], float],
    pooling: Pooling,
    steps: int,
    *,
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> Student:
    """The distilled model; the one that went in where `judge` says more of that."""
    student, back = copy.deepcopy(narrowed)
    base: nn.Module = student.base_model  # type: ignore[assignment]
    learning = list(base.get_submodule(original.kind.stack).parameters())
    learning += [] if back is None else back.parameters()
    optimizer = torch.optim.AdamW(learning, lr=_peak_rate(student, lessons), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = random.Random(seed)
    for step in range(steps):
        progress("distilling", step, steps)
        read, their_read = order.choice(lessons)
        with torch.no_grad():
            wanted = _said(original.model, their_read)
        said = _said(student, read)
        if back is not None:
            said[HIDDEN] = back(said[HIDDEN])
        loss = _loss(said, wanted, (read.mask, their_read.mask), pooling)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    progress("distilling", steps, steps)
    return max((narrowed, (student, back)), key=judge)


def _peak_rate(model: nn.Module, lessons: Sequence[Lesson]) -> float:
    """By width, as of decoders, but no more than what the narrowest encoders take well."""
    width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    tokens = sum(int(read.mask.sum()) for read, _ in lessons) / len(lessons)
    return min(MOST_RATE, rate_by_width(width, tokens))


def _rate(step: int, steps: int) -> float:
    """Up, then down along half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _said(model: nn.Module, read: Batch) -> Said:
    """The last hidden states, and the answers of a head that has few."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    said: Said = {}
    hook = base.register_forward_hook(lambda _, args, made: said.update({HIDDEN: made[0]}))
    try:
        made = model(**read.inputs)
    finally:
        hook.remove()
    name = type(model).__name__
    known = () if name.endswith("ForMaskedLM") else outputs_of(name)
    return {**said, **{one: made[one] for one in known if one != HIDDEN}}


def _loss(made: Said, wanted: Said, masks: tuple[Tensor, Tensor], pooling: Pooling) -> Tensor:
    """Args: masks: (N, L) where ours reads tokens, and (N, M) where the original does."""
    mask_NL, wanted_mask_NM = masks
    hidden_NLD, wanted_NMD = made[HIDDEN], wanted[HIDDEN]
    ours_ND = pooling(hidden_NLD, mask_NL)
    theirs_ND = pooling(wanted_NMD, wanted_mask_NM)
    loss = COSINE_WEIGHT * (1 - (ours_ND * theirs_ND).sum(-1)).mean()
    alike_N = mask_NL.sum(-1) == wanted_mask_NM.sum(-1)
    ours, theirs = mask_NL & alike_N[:, None], wanted_mask_NM & alike_N[:, None]
    if alike_N.any():
        gap = (hidden_NLD[ours] - wanted_NMD[theirs]).square().mean()
        loss = loss + gap / wanted_NMD[wanted_mask_NM].square().mean()
    for name in [name for name in made if name != HIDDEN]:
        said, expected = made[name], wanted[name]
        if said.ndim == 3:  # classes of each token
            said, expected = said[ours], expected[theirs]
        elif name != "logits":  # where an answer starts or ends
            length = min(said.shape[1], expected.shape[1])
            said = said.masked_fill(~mask_NL, -1e9)[alike_N, :length]
            expected = expected.masked_fill(~wanted_mask_NM, -1e9)[alike_N, :length]
        if len(said):
            loss = loss + _divergence(said, expected)
    return loss


def _divergence(said_NC: Tensor, wanted_NC: Tensor) -> Tensor:
    """KL(wanted || said) of the classes that logits speak of, in nats, the mean."""
    said, wanted = said_NC.log_softmax(-1), wanted_NC.log_softmax(-1)
    return nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean")
