"""How a model that is being healed does on held-out windows, with weights as they will be stored.

Shapes: N windows, L tokens per window, B windows at once, C predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dotexport.exports.quality import predictions
from dotexport.healing.distil_loss import predict
from dotexport.healing.distil_memory import windows_at_once


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


@torch.no_grad()
def judge(student: Any, teacher: Any, windows_NL: Tensor) -> Judgement:
    """KL and perplexity on whole windows, in float32 whatever the steps compute in."""
    device = next(student.parameters()).device
    at_once = windows_at_once(windows_NL.shape[1], student.config.vocab_size)
    sums = []
    for windows_BL in torch.split(windows_NL.to(device), at_once):
        ours_CV, theirs_CV = (predict(m, windows_BL[:, :-1])[0] for m in (student, teacher))
        sums.append(predictions(ours_CV, theirs_CV, windows_BL[:, 1:].reshape(-1)).sum(0))
    mean = torch.stack(sums).sum(0) / (len(windows_NL) * (windows_NL.shape[1] - 1))
    ours, theirs, kl, _ = mean.tolist()
    return Judgement(kl, math.exp(min(ours, 700.0)), math.exp(min(theirs, 700.0)))


def rounded_as_stored(model: Any, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """A copy of all weights in the dtypes of the checkpoint; a tied table comes up once."""
    return {
        name: parameter.detach().clone().to(dtypes[name])
        for name, parameter in model.named_parameters()
    }


def assign(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].to(parameter.device)
