"""What a loss inside the model does to its answer: a few calls of the denoiser, replayed.

Shapes: O outputs of a writer, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.calibration import Calibration
from dotexport.diffusion.moments import Moments
from dotexport.diffusion.sampling import replaced
from dotexport.diffusion.tables import Site, linear
from dotexport.merging import obs

CALLS = 6


@dataclass(frozen=True)
class Probe:
    """Calls of a model, spread over a trajectory, and what it answered."""

    model: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    answers: list[Tensor]

    @classmethod
    def record(cls, calibration: Calibration, *, count: int = CALLS) -> Probe:
        """Run one batch of prompts and keep `count` calls, evenly spread."""
        model, seen = calibration.model, []
        forward = model.forward

        def recording(*args: Any, **kwargs: Any) -> Any:
            seen.append(copy.copy((args, kwargs)))
            return forward(*args, **kwargs)

        few = calibration.prompts[: calibration.options.batch]
        with replaced(model, "forward", recording):
            replace(calibration, prompts=few).run("recording")
        picked = [seen[n * len(seen) // count] for n in range(min(count, len(seen)))]
        return cls(model, picked, [_answer(model, call) for call in picked])

    def harm(
        self, site: Site, kept: Tensor, moments: Mapping[str, Moments], damping: float
    ) -> float:
        """Mean squared change of the answer when only `kept` units of one site speak."""
        with ExitStack() as stack:
            for name in site.writers:
                layer = linear(self.model, name)
                weight, bias = _without(
                    layer, site.columns(self.model, name), kept, moments[name], damping
                )
                stack.enter_context(_swapped(layer, "weight", weight))
                if bias is not None:
                    stack.enter_context(_swapped(layer, "bias", bias))
            changed = [_answer(self.model, call) for call in self.calls]
        gaps = [(a - b).square().mean() for a, b in zip(changed, self.answers, strict=True)]
        return float(torch.stack(gaps).mean())


def _without(
    layer: nn.Linear, columns_NS: Tensor, kept: Tensor, moments: Moments, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Weights and bias with zeros where units left, the others refitted."""
    centred = layer.bias is not None
    problem = moments.problem(layer.weight.detach(), columns_NS, damping=damping, centred=centred)
    stays_I = torch.ones(layer.in_features, dtype=torch.bool)
    stays_I[columns_NS.flatten()] = False
    stays_I[columns_NS[kept].flatten()] = True
    weight_OI = torch.zeros_like(problem.weight_OI)
    weight_OI[:, stays_I] = obs.refit(
        problem.weight_OI, problem.hessian_II, stays_I.nonzero().flatten()
    )
    bias_O = None
    if centred:
        shift_O = (layer.weight.detach().double() - weight_OI) @ moments.mean
        bias_O = (layer.bias.detach().double() + shift_O).to(layer.bias.dtype)
    return weight_OI.to(layer.weight.dtype), bias_O


def _swapped(layer: nn.Linear, name: str, value: Tensor) -> Any:
    stack = ExitStack()
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value))
    stack.callback(setattr, layer, name, old)
    return stack


@torch.no_grad()
def _answer(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    made = model(*args, **kwargs)
    answer: Tensor = made[0] if isinstance(made, tuple) else made.sample
    return answer.clone()
