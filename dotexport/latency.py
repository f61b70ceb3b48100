"""Time of one decoded token by size, measured on this device with torch and random weights.

All layers are alike, so one layer and the head are timed and the rest is arithmetic. This decides
between sizes; what a runtime makes of them is for `dotexport bench` to say.

Shapes: D hidden_size.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from dotexport.errors import UsageError
from dotexport.families import Sizes
from dotexport.layers import Stock

if TYPE_CHECKING:
    from dotexport.sizing import Plan

ROUNDS = 7
LEAST_SECONDS = 0.004  # of one timing: far above the clock's resolution
TIMED = 12  # plans; a sum of parts is fitted to them and answers for the others


@dataclass(frozen=True)
class Clock:
    """Time of a token as a sum of parts: attention, MLP and head by their parameters, and a rest.

    Attributes:
        seconds: per parameter of each part, and for the rest; in units of the original's token.
        measured: ratio of every plan that was timed.
    """

    seconds: tuple[float, ...]
    measured: Mapping[Sizes, float]

    @classmethod
    def of(cls, config: Mapping[str, Any], whole: Plan, plans: list[Plan]) -> Clock:
        """Time some of these plans, each in turns with the original, and fit the sum."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        original = _token(config, whole, device)
        by_size = sorted(plans, key=lambda p: p.parameters_after)
        chosen = {round(n) for n in np.linspace(0, len(plans) - 1, min(TIMED, len(plans)))}
        measured = {whole.after: 1.0}
        for plan in (by_size[n] for n in sorted(chosen)):
            if plan.after not in measured:
                measured[plan.after] = _ratio(_token(config, plan, device), original)
        parts = np.array([_parts(sizes) for sizes in measured])
        scale = parts.max(0)
        seconds, _ = nnls(parts / scale, np.array(list(measured.values())))
        return cls(tuple(seconds / scale), measured)

    def ratio(self, plan: Plan) -> float:
        """Time of a token at these sizes over the original's."""
        if plan.after in self.measured:
            return self.measured[plan.after]
        return float(np.dot(self.seconds, _parts(plan.after)))


def _parts(sizes: Sizes) -> tuple[float, ...]:
    width, spaces = sizes.hidden_size, sizes.spaces
    attention = 2 * width * (spaces["query"] + spaces["kv"]) * sizes.num_layers
    mlp = 3 * width * sizes.intermediate_size * sizes.num_layers
    return float(attention), float(mlp), float(width * sizes.vocab_size), 1.0


def _ratio(ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    """In turns, so that what else the machine does falls on both alike."""
    times = [(_time(ours), _time(theirs)) for _ in range(ROUNDS)]
    return statistics.median(mine / other for mine, other in times)


def _token(config: Mapping[str, Any], plan: Plan, device: torch.device) -> Callable[[], None]:
    """One decoder layer as often as there are layers, all with the same weights, and the head."""
    from dotexport.prepare import narrowed_config

    stock = Stock.of(narrowed_config(config, plan), device)
    layer = stock.layer(0).to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    sizes = plan.after
    head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False, device=device)
    x_11D = torch.randn(1, 1, sizes.hidden_size, device=device)
    positions = stock.positions(x_11D)

    @torch.no_grad()
    def token() -> None:
        for _ in range(sizes.num_layers):
            layer(x_11D, position_embeddings=positions, attention_mask=None)
        head(x_11D)
        if device.type == "cuda":
            torch.cuda.synchronize()

    token()
    return token


def _time(step: Callable[[], None]) -> float:
    """Seconds of one call, over enough of them to be told apart from the clock."""
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < LEAST_SECONDS or calls < 2:
        step()
        calls += 1
    return elapsed / calls


def parse_latency(text: str) -> float:
    """A share of the original's time from `0.8x`.

    Raises:
        UsageError: not a share between 0 and 1.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)x", text.strip())
    if not match or not 0 < float(match[1]) <= 1:
        raise UsageError(f"--latency {text!r} is no budget; expected a share such as 0.8x")
    return float(match[1])
