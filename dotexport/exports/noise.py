"""What a precision costs in torch itself: the error that tolerances follow from.

The model that artifacts are held against is run once more with the rounding of the precision, in
weights and in what runs between them. fp32 is held against float64.

Shapes: P positions, V vocabulary; O, I outputs and inputs of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Bits of a weight, and how many of a row share a scale: all, where some runtimes do it so.
BITS = {"int8": (8, None), "int6-k": (6, 32)}

Run = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Noise:
    """Of a precision, over all positions.

    Attributes:
        max_abs: largest difference of a logit.
        relative: root mean square difference over the spread of torch's logits.
        kl: mean KL divergence from torch's next-token distribution, in nats.
    """

    max_abs: float
    relative: float
    kl: float

    @classmethod
    def of(cls, mine_PV: NDArray[Any], torch_PV: NDArray[Any]) -> Noise:
        gap_PV = mine_PV.astype(np.float64) - torch_PV
        return cls(
            float(np.abs(gap_PV).max()),
            float(np.sqrt(np.square(gap_PV).mean())) / max(spread(torch_PV), 1e-30),
            kl_divergence(torch_PV, mine_PV),
        )


def measured(
    precision: str, model: Any, run: Run, torch_PV: NDArray[Any], restore: Callable[[], None]
) -> Noise | None:
    """The noise of a precision; None: torch has no measure of it, or no room.

    Args:
        model: in float32.
        run: the logits of the model as it is, at the same positions as `torch_PV`.
        restore: puts the weights back.
    """
    if precision == "fp32":
        bytes_64 = 8 * sum(parameter.numel() for parameter in model.parameters())
        if bytes_64 > psutil.virtual_memory().available / 2:
            return None
        model.double()
        found = Noise.of(run(), torch_PV)
        model.float()
        return found
    if precision not in (*HALVES, *BITS):
        return None
    rounding = _in_halves if precision in HALVES else _in_integers
    try:
        with rounding(model, precision):
            return Noise.of(run(), torch_PV)
    finally:
        restore()


@contextmanager
def _in_halves(model: Any, precision: str) -> Iterator[None]:
    kind = HALVES[precision]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).float()
    leaves = [module for module in model.modules() if not any(module.children())]
    with _hooked(
        module.register_forward_hook(lambda _, inputs, output: _through(output, kind))
        for module in leaves
    ):
        yield


def _through(output: Any, kind: torch.dtype) -> Any:
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return output.to(kind).float()
    return output


@contextmanager
def _in_integers(model: Any, precision: str) -> Iterator[None]:
    products = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for product in products:
        product.weight.data = rounded_to_bits(product.weight.data, *BITS[precision])
    with _hooked(
        product.register_forward_pre_hook(lambda _, inputs: rounded_to_bits(inputs[0], 8, None))
        for product in products
    ):
        yield


@contextmanager
def _hooked(handles: Iterator[Any]) -> Iterator[None]:
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def rounded_to_bits(x_OI: torch.Tensor, bits: int, block: int | None) -> torch.Tensor:
    """Nearest of 2^bits - 1 levels around zero, per block of the last axis or all of it."""
    block = block or x_OI.shape[-1]
    padded = torch.nn.functional.pad(x_OI, (0, -x_OI.shape[-1] % block))
    blocks = padded.reshape(*x_OI.shape[:-1], -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1, largest / (2 ** (bits - 1) - 1))
    rounded = (blocks / scale).round() * scale
    return rounded.reshape(*x_OI.shape[:-1], -1)[..., : x_OI.shape[-1]]


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
