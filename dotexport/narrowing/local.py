"""Local healing: a few optimiser steps on one narrowed sublayer, while it is in memory.

The closed form cannot reach the gate and up rows of an MLP, because a nonlinearity lies between
them and what is fitted. Gradients can: the sublayer's own weights move so that the stream behind
it comes closer to the original's. No backward pass leaves the sublayer, so memory stays that of
one.

Shapes: T tokens, B windows of a batch, L tokens per window, K width of the narrowed stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dotexport.narrowing.narrow_options import LocalOptions
from dotexport.narrowing.streams import Step, Streams
from dotexport.processes.processes import Processes


@dataclass(frozen=True)
class Healed:
    """Held-out error before and after, as a share of the original stream's energy."""

    before: float
    after: float
    steps: int

    def as_dict(self) -> dict[str, Any]:
        return {"error_before": self.before, "error_after": self.after, "steps": self.steps}


def heal(
    parameters: list[Tensor],
    step: Step,
    streams: Streams,
    goal: Step,
    options: LocalOptions,
    *,
    tokenwise: bool,
    seed: int,
) -> Healed:
    """Move `parameters` in place so that `step` turns the narrowed stream into E^T X+.

    Args:
        parameters: leaves that `step` reads.
        step: the narrowed sublayer, stream (B, L, K) to stream (B, L, K).
        streams: the original's behind the sublayer, the narrowed one before it.
        goal: X+ to E^T X+.
        tokenwise: whether `step` treats tokens alone, so that a batch may mix those of all windows.

    Each token counts by one over the mean square of its X+, as in the writer's closed form.
    """
    batches = _Batches(streams, goal, tokenwise)
    best, before = [p.detach().clone() for p in parameters], batches.held_out_error(step)
    least, steps = before, options.num_steps(batches.num_tokens)
    optimiser = _adam(parameters, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: _cosine(k, steps))
    checked = {round(steps * (n + 1) / options.checks) for n in range(options.checks)}
    for number, (before_BLK, goal_BLK, weight_BL1, share) in enumerate(
        batches.draw(options.tokens, steps, seed), start=1
    ):
        optimiser.zero_grad()
        if share > 0:
            with torch.enable_grad():
                loss = share * _error(step(before_BLK), goal_BLK, weight_BL1)
                loss.backward()
        _sum_gradients(parameters, streams.processes)
        optimiser.step()
        schedule.step()
        if number in checked and (error := batches.held_out_error(step)) < least:
            best, least = [p.detach().clone() for p in parameters], error
    best = streams.processes.agreed(lambda: best)
    for parameter, kept in zip(parameters, best, strict=True):
        parameter.detach().copy_(kept)
    return Healed(before, least, steps)


def _adam(parameters: list[Tensor], options: LocalOptions) -> torch.optim.Optimizer:
    """Adam moves every weight by about its learning rate: a share of what such weights are."""
    groups = [
        {"params": [p], "lr": options.learning_rate * float(p.detach().square().mean().sqrt())}
        for p in parameters
        if bool(p.any())  # a tensor of zeros has no size to go by
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _sum_gradients(parameters: list[Tensor], processes: Processes) -> None:
    """Of a step's loss over the tokens of all processes."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    processes.sum(*found)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def _cosine(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, min(10, steps // 4)))
    return warm * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def _error(found_BLK: Tensor, goal_BLK: Tensor, weight_BL1: Tensor) -> Tensor:
    error: Tensor = ((found_BLK - goal_BLK).square() * weight_BL1).mean()
    return error


@dataclass
class _Batches:
    """What healing reads: (narrowed stream before, E^T X+, weight), in float32 on the device."""

    streams: Streams
    goal: Step
    tokenwise: bool

    def __post_init__(self) -> None:
        count, self.length = self.streams.windows_NL.shape
        held, every = self.streams.held_out, range(count)
        apart = held | self.streams.judging
        self.train = torch.tensor([n for n in every if n not in apart])
        self.judged = held or frozenset(every)
        self.held = self._beside(torch.tensor(self.streams.places(self.judged), dtype=torch.long))

    @property
    def num_tokens(self) -> int:
        return len(self.train) * self.length

    def draw(
        self, tokens: int, steps: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """What each step reads of that which lies here, and which share of the step it is."""
        asked = (self.tokenwise, tokens, steps, seed)
        if asked not in self.streams.drawn:  # every layer is given the same ones
            places = self._places(tokens, steps, seed)
            each = self.length if self.tokenwise else 1
            here = [self._beside(found) for found in self._here(places, each)]
            self.streams.drawn[asked] = here, places.shape[1]
        here, count = self.streams.drawn[asked]
        for places in here:
            yield *self._read(places, tokenwise=self.tokenwise), len(places) / count

    def held_out_error(self, step: Step) -> float:
        most = max(1, 8192 // self.length)
        total = torch.zeros((), device=self.streams.device, dtype=torch.float64)
        for n_B in filter(len, torch.split(self.held, most)):
            with torch.no_grad():
                before_BLK, goal_BLK, weight_BL1 = self._read(n_B, tokenwise=False)
                total += _error(step(before_BLK), goal_BLK, weight_BL1).double() * len(n_B)
        self.streams.processes.sum(total)
        return float(total) / len(self.judged)

    def _places(self, tokens: int, steps: int, seed: int) -> Tensor:
        """What each step reads: (steps, tokens), counted through all windows; or (steps, B)."""
        random = torch.Generator().manual_seed(seed)
        places = []
        for _ in range(steps):
            count = tokens if self.tokenwise else max(1, tokens // self.length)
            n_B = self.train[torch.randint(len(self.train), (count,), generator=random)]
            if self.tokenwise:
                n_B = n_B * self.length + torch.randint(self.length, (tokens,), generator=random)
            places.append(n_B)
        return torch.stack(places)

    def _here(self, places: Tensor, each: int) -> list[Tensor]:
        """Of each step's places those that lie here, counted through the windows that do."""
        row_N = torch.full((len(self.streams.windows_NL),), -1)
        row_N[torch.tensor(self.streams.own, dtype=torch.long)] = torch.arange(
            len(self.streams.own)
        )
        rows = row_N[places // each]
        found = rows * each + places % each
        return [step[row >= 0] for step, row in zip(found, rows, strict=True)]

    def _beside(self, places: Tensor) -> Tensor:
        """On the device of the streams: a step then sends nothing there."""
        return places.to(self.streams.original_NLD.device)

    def _read(self, places: Tensor, *, tokenwise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens from anywhere as one window, or whole windows."""

        def at(stream_NLX: Tensor) -> Tensor:
            part = stream_NLX.flatten(0, 1)[places][None] if tokenwise else stream_NLX[places]
            return part.to(self.streams.device, non_blocking=True)

        x_BLD = at(self.streams.original_NLD)
        weight_BL1 = x_BLD.square().mean(-1, keepdim=True).clamp_min(1e-12).reciprocal()
        return at(self.streams.narrowed_NLK), self.goal(x_BLD), weight_BL1
