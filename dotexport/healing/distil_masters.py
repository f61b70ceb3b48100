"""Weights in two precisions: an optimiser moves them in float32, a model computes in bfloat16.

They are cast once a step, and not in every product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.healing.distil_loss import Reads, read


@dataclass(frozen=True)
class Masters:
    """Weights of a model by name, in float32; those of the model itself where it computes so.

    Weights of one process; those that several share are Shards (distil_shards.py).

    Attributes:
        read: how the model is asked for its states.
    """

    model: Any
    weights: dict[str, nn.Parameter]
    read: Reads = read

    @classmethod
    def of(cls, model: Any, passes: torch.dtype) -> Masters:
        """Of a model in float32, which computes in the dtype of passes from now on."""
        weights = dict(model.named_parameters())
        if passes != torch.float32:
            weights = {name: nn.Parameter(own.data) for name, own in weights.items()}
            compute_in(model, passes)
        return cls(model, weights)

    def take_gradients(self) -> None:
        """What a backward pass left in the model is added to what is here."""
        for name, used in self.model.named_parameters():
            own = self.weights[name]
            if used is own or used.grad is None:
                continue
            if own.grad is None:
                own.grad = used.grad.float()
            else:
                own.grad += used.grad
            used.grad = None

    def hand_back(self) -> None:
        """The model computes with what the optimiser made of the weights."""
        for name, used in self.model.named_parameters():
            if used is not self.weights[name]:
                used.data.copy_(self.weights[name].data)

    def rounded(self, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """A copy of all weights in the dtypes of a checkpoint; a tied table comes up once."""
        return {name: own.detach().clone().to(dtypes[name]) for name, own in self.weights.items()}

    @contextmanager
    def computing_with(self, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
        """A model with these weights, in float32, for as long as the block lasts."""
        own = {name: parameter.data for name, parameter in self.model.named_parameters()}
        _assign(self.model, {name: tensor.float() for name, tensor in tensors.items()})
        try:
            yield self.model
        finally:
            _assign(self.model, own)

    def cut(self, whole: Tensor) -> Tensor:
        """What is kept here of a tensor."""
        return whole

    def whole(self, kept: Tensor) -> Tensor:
        """A tensor of which this is kept here."""
        return kept


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Weights in this dtype; buffers, such as rotary frequencies, stay in theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _assign(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].to(parameter.device)
