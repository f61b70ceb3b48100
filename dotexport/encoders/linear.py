"""Linear layers with their biases as one more input, and what modules of a layer read and say.

Shapes: O outputs, I inputs and a one for the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.merging.refit import Moments

Sums = tuple[Moments, Moments]
"""Over tokens that are fitted, and over those that judge."""


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    return layer.get_submodule(name)  # type: ignore[return-value]


def sums_of(inputs: int, outputs: int, *, biased: bool) -> Sums:
    """Empty ones."""
    train, held = (Moments.zeros(inputs + biased, outputs) for _ in range(2))
    return train, held


def with_one(z_TI: Tensor, *, biased: bool) -> Tensor:
    """What a linear layer reads, and the one that its bias stands for."""
    return torch.cat([z_TI, torch.ones_like(z_TI[:, :1])], dim=1) if biased else z_TI


def with_bias(layer: nn.Linear) -> Tensor:
    if layer.bias is None:
        return layer.weight.detach()
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)


def and_bias(kept: Tensor, layer: nn.Linear) -> Tensor:
    """The kept inputs, and the one that stands for the bias."""
    if layer.bias is None:
        return kept
    return torch.cat([kept, torch.tensor([layer.in_features])])


def given_bias(moments: Moments, layer: nn.Linear) -> Moments:
    """Covariances where the layer has a bias."""
    return moments if layer.bias is None else moments.given_last()


def split(layer: nn.Linear, weights_OI: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias if it has one."""
    weights_OI = weights_OI.float()
    if layer.bias is None:
        return weights_OI, None
    return weights_OI[:, :-1], weights_OI[:, -1]


def put(layer: nn.Linear, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """The same module with these."""
    layer.weight = nn.Parameter(weight_OI.clone())
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.clone())
    layer.out_features, layer.in_features = weight_OI.shape


def hidden(made: Any) -> Tensor:
    """The stream, of what a module says."""
    found: Tensor = made[0] if isinstance(made, tuple) else made
    return found


class watched:  # noqa: N801  a context
    """What modules of a layer read and say: name -> (input, output)."""

    def __init__(self, layer: nn.Module, names: set[str]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.handles = [
            layer.get_submodule(name).register_forward_hook(self._taker(name)) for name in names
        ]

    def _taker(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self.found[name] = (inputs[0], hidden(output))

        return take

    def __enter__(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.found

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
