"""How a model that is being healed does on held-out windows, with weights as they will be stored.

Shapes: N windows, L tokens per window, P = L - 1 predictions of one, B windows at once,
C predictions, D width of the original, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dotexport.exports.quality import predictions
from dotexport.healing.distil_head import Head, slices
from dotexport.healing.distil_loss import read

TOKENS_AT_ONCE = 2048
LOGITS_BYTES = 32 << 20  # of a chunk's logits; a few of these exist at a time


@dataclass(frozen=True)
class Judgement:
    """How a model does on the held-out windows.

    Attributes:
        kl: mean KL(original || model) per prediction, in nats.
        perplexity, original_perplexity: of both on the same predictions.
    """

    kl: float
    perplexity: float
    original_perplexity: float


@dataclass(frozen=True)
class HeldOut:
    """Windows that nothing is trained on, and what the original makes of them, in float32.

    Attributes:
        theirs: hidden states behind the original's last norm, on the host: it is asked once.
        head: of the original, read anew whenever it is asked for.
    """

    windows_NL: Tensor
    theirs: tuple[Tensor, ...]
    head: Callable[[], Head]

    @classmethod
    def of(cls, windows_NL: Tensor, teacher: Any, head: Callable[[], Head]) -> HeldOut:
        """What a teacher in float32 makes of them."""
        asked = (_read(teacher, windows_BL).cpu() for windows_BL in _at_once(windows_NL))
        return cls(windows_NL, tuple(asked), head)


@torch.no_grad()
def judge(student: Any, held: HeldOut) -> Judgement:
    """KL and perplexity on whole windows, in float32 whatever the steps compute in."""
    ours, theirs = Head.of(student), held.head()
    rows = LOGITS_BYTES // (4 * len(theirs.table_VK))
    device = ours.table_VK.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for windows_BL, theirs_CD in zip(_at_once(held.windows_NL), held.theirs, strict=True):
        ours_CK, next_C = _read(student, windows_BL), windows_BL[:, 1:].flatten().to(device)
        theirs_CD = theirs_CD.to(device)
        for chunk in slices(len(next_C), rows):
            logits_CV = ours.logits(ours_CK[chunk]), theirs.logits(theirs_CD[chunk])
            sums += predictions(*logits_CV, next_C[chunk]).sum(0)
    count = len(held.windows_NL) * (held.windows_NL.shape[1] - 1)
    nats, original, kl, _ = (sums / count).tolist()
    return Judgement(kl, math.exp(min(nats, 700.0)), math.exp(min(original, 700.0)))


@torch.no_grad()
def _read(model: Any, windows_BL: Tensor) -> Tensor:
    device = model.get_output_embeddings().weight.device
    return read(model, windows_BL[:, :-1].to(device), streams=False)[0]


def _at_once(windows_NL: Tensor) -> tuple[Tensor, ...]:
    return torch.split(windows_NL, max(1, TOKENS_AT_ONCE // windows_NL.shape[1]))


@contextmanager
def computing_with(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model has these weights, in float32, for as long as the block lasts."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    assign(model, {name: tensor.float() for name, tensor in tensors.items()})
    try:
        yield
    finally:
        assign(model, own)


def assign(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].to(parameter.device)
