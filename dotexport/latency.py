"""Time of one decoded token by size, measured on this device with torch and random weights.

All layers are alike, so one layer and the head are timed and the rest is arithmetic. This decides
between sizes; what a runtime makes of them is for `dotexport bench` to say.

Shapes: L tokens in the KV cache, D hidden_size.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dotexport.errors import UsageError
from dotexport.layers import Stock

if TYPE_CHECKING:
    from dotexport.sizing import Plan

ROUNDS = 7
LEAST_SECONDS = 0.004  # of one timing: far above the clock's resolution


@dataclass
class Clock:
    """Times of plans of one model.

    Attributes:
        config: of the original.
        seconds: per plan that was asked for, of one token.
    """

    config: Mapping[str, Any]
    whole: Plan
    device: torch.device
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], whole: Plan) -> Clock:
        return cls(config, whole, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def ratio(self, plan: Plan) -> float:
        """Time of a token at these sizes over the original's.

        Both are timed in turns, so that what else the machine does falls on both alike.
        """
        sizes = plan.after
        key = (sizes.hidden_size, sizes.intermediate_size, sizes.num_key_value_heads)
        if key not in self.known:
            self.known[key] = self._measure(plan)
        return self.known[key]

    def _measure(self, plan: Plan) -> float:
        ours, theirs = (self._token(p) for p in (plan, self.whole))
        times = [(_time(ours), _time(theirs)) for _ in range(ROUNDS)]
        return statistics.median(mine / other for mine, other in times)

    def _token(self, plan: Plan) -> Callable[[], None]:
        """One decoder layer per layer, all with the same weights, and the head."""
        from dotexport.shrinking import narrowed_config

        stock = Stock.of(narrowed_config(self.config, plan), self.device)
        layer = stock.layer(0).to_empty(device=self.device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        sizes = plan.after
        head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False, device=self.device)
        x_11D = torch.randn(1, 1, sizes.hidden_size, device=self.device)
        positions = stock.positions(x_11D)

        @torch.no_grad()
        def token() -> None:
            for _ in range(sizes.num_layers):
                layer(x_11D, position_embeddings=positions, attention_mask=None)
            head(x_11D)
            if self.device.type == "cuda":
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
