"""What a precision costs in torch itself: the error that tolerances follow from.

The model that artifacts are held against is run once more with the rounding of the precision, in
weights and in what runs between them. fp32 is held against float64.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dotexport.models.loading import Loaded

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Run = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Noise:
    """Of a precision, over all positions.

    Attributes:
        max_abs: largest difference of a logit.
        relative: root mean square difference over the spread of torch's logits.
    """

    max_abs: float
    relative: float

    @classmethod
    def of(cls, mine_PV: NDArray[Any], torch_PV: NDArray[Any]) -> Noise:
        gap_PV = mine_PV.astype(np.float64) - torch_PV
        return cls(
            float(np.abs(gap_PV).max()),
            float(np.sqrt(np.square(gap_PV).mean())) / max(spread(torch_PV), 1e-30),
        )


def measured(precision: str, loaded: Loaded, run: Run, torch_PV: NDArray[Any]) -> Noise:
    """The noise of a precision.

    Args:
        loaded: in float32.
        run: the logits of the model as it is, at the same positions as `torch_PV`.
    """
    if precision == "fp32":
        with loaded.changed(lambda _, values: values.double(), times=2):
            return Noise.of(run(), torch_PV)
    with _in_halves(loaded, HALVES[precision]):
        return Noise.of(run(), torch_PV)


@contextmanager
def _in_halves(loaded: Loaded, kind: torch.dtype) -> Iterator[None]:
    leaves = [module for module in loaded.model.modules() if not any(module.children())]
    handles = [
        leaf.register_forward_hook(lambda _, inputs, output: _through(output, kind))
        for leaf in leaves
    ]
    try:
        with loaded.changed(lambda _, values: values.to(kind).float()):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _through(output: Any, kind: torch.dtype) -> Any:
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return output.to(kind).float()
    return output


def spread(logits_PV: NDArray[Any]) -> float:
    """Root mean square of the logits around the mean of their position."""
    centred_PV = logits_PV - logits_PV.mean(-1, keepdims=True)
    return float(np.sqrt(np.square(centred_PV, dtype=np.float64).mean()))


def kl_divergence(torch_PV: NDArray[Any], mine_PV: NDArray[Any]) -> float:
    """Mean KL(torch || mine) of the next-token distributions, in nats."""
    p, q = log_softmax(torch_PV), log_softmax(mine_PV)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits_PV: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinite logits are counted and reported on their own
        shifted = logits_PV.astype(np.float64) - logits_PV.max(-1, keepdims=True)
    log_probability: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probability
