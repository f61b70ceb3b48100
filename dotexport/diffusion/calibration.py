"""Second moments from the model's own sampling trajectories: no picture is needed.

For each package of layers the whole pipeline runs over all prompts, with the model as pruned so
far, and every linear layer of the package sums up what it reads. Statistics of one package are in
memory at a time.

Shapes: T tokens, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.moments import Moments
from dotexport.diffusion.pipeline_options import SampleOptions, TimestepWeights
from dotexport.diffusion.sampling import Clock, batches, component_of, replaced, sample
from dotexport.diffusion.tables import linear
from dotexport.errors import CalibrationError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A pipeline, what it is asked, and how its steps count.

    Attributes:
        teacher: the dense model, which then answers what each layer should say; None: each layer
            should say what it says.
    """

    pipe: Any
    prompts: Sequence[Any]
    options: SampleOptions
    weights: TimestepWeights
    teacher: nn.Module | None = None
    progress: Progress = lambda stage, done, total: None

    @property
    def model(self) -> nn.Module:
        model: nn.Module = getattr(self.pipe, component_of(self.pipe))
        return model

    def moments(self, layers: Sequence[str], stage: str) -> dict[str, Moments]:
        """Moments of these linear layers, by name, after one run over all prompts.

        Raises:
            CalibrationError: the model says NaN, or never reached a layer.
        """
        found = {name: self._zeros(name) for name in layers}
        clock = Clock(self.pipe.scheduler)
        answers: dict[str, list[Tensor]] = {name: [] for name in layers}
        with ExitStack() as stack:
            stack.enter_context(clock.running())
            for name in layers:
                hook = self._taker(found[name], answers[name], clock)
                handle = linear(self.model, name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            if self.teacher is not None:
                stack.enter_context(self._asked(self.teacher, answers))
            self.run(stage)
        for name, moments in found.items():
            check_moments(name, moments)
        return found

    def run(self, stage: str) -> list[Tensor]:
        """All prompts through the pipeline; their latents, batch by batch."""
        self.progress(stage, 0, len(self.prompts))
        made = []
        for first, some in batches(self.prompts, self.options.batch):
            made.append(sample(self.pipe, some, first, self.options))
            self.progress(stage, first + len(some), len(self.prompts))
        return made

    def _zeros(self, name: str) -> Moments:
        layer = linear(self.model, name)
        return Moments.zeros(layer.in_features, layer.out_features if self.teacher else 0)

    def _taker(self, moments: Moments, answers: list[Tensor], clock: Clock) -> Callable[..., None]:
        def take(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].flatten(0, -2)
            y_TO = answers.pop(0).flatten(0, -2) if self.teacher is not None else None
            moments.add(x_TI, y_TO, weight=self.weights.at(*clock.now))

        return take

    @contextmanager
    def _asked(self, teacher: nn.Module, answers: dict[str, list[Tensor]]) -> Iterator[None]:
        """Before every call of the model, ask the teacher the same and keep what its layers say."""

        def keep(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                answers[name].append(output)

            return hook

        forward = self.model.forward

        def both(*args: Any, **kwargs: Any) -> Any:
            teacher(*args, **kwargs)
            return forward(*args, **kwargs)

        with ExitStack() as stack:
            for name in answers:
                handle = linear(teacher, name).register_forward_hook(keep(name))
                stack.callback(handle.remove)
            stack.enter_context(replaced(self.model, "forward", both))
            yield


def check_moments(name: str, moments: Moments) -> None:
    if not moments.weight:
        raise CalibrationError(f"the pipeline never calls {name}; it cannot be calibrated")
    if not torch.isfinite(moments.inputs_II).all():
        raise CalibrationError(
            f"{name} reads NaN or infinity; the model overflows on these prompts"
        )


def packages(items: Sequence[Any], count: int) -> list[list[Any]]:
    """Cut into `count` runs of about the same length, none of them empty.

    >>> packages([1, 2, 3, 4, 5], 2)
    [[1, 2, 3], [4, 5]]
    """
    count = max(1, min(count, len(items)))
    base, more = divmod(len(items), count)
    ends = [n * base + min(n, more) for n in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(ends)]
