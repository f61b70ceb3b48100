"""A target whose artifacts do nothing but wait: the truth about their speed is known.

An artifact is a file planted.json with the milliseconds of a prefill and of a decode step, and
what else should happen. A model with `tile` in its config waits as a kernel that works in tiles of
so many MLP neurons would. It is found through the entry points beside it, as any third party's is.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dotexport.errors import RuntimeMissingError
from dotexport.exports.target import Logits, Tokens

if TYPE_CHECKING:  # the measuring processes of real targets need no torch either
    from dotexport.models.checkpoint import Checkpoint

FILE = "planted.json"


class Waiting:
    """A session that takes as long as it was told."""

    providers = ("Patience",)

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.runs = 0

    def start(self, tokens_BL: Tokens, lengths_B: object = None) -> Logits:
        self._misbehave()
        self._check(tokens_BL)
        time.sleep(self.plan.get("start_ms", 1) / 1e3)
        return self._logits(*tokens_BL.shape)

    def step(self, tokens_B: Tokens) -> Logits:
        self._check(tokens_B)
        time.sleep(self.plan.get("step_ms", 1) / 1e3)
        return self._logits(*tokens_B.shape)

    def _logits(self, *shape: int) -> Logits:
        value = np.nan if self.plan.get("nan") else 0.0
        return np.full((*shape, self.plan.get("vocabulary", 50)), value, np.float32)

    def _check(self, tokens: Tokens) -> None:
        assert tokens.max() < self.plan.get("vocabulary", 50), "an id above the vocabulary"

    def _misbehave(self) -> None:
        self.runs += 1
        if self.runs == 1:
            print("chatter on stdout that is no part of the protocol")
            os.system("echo chatter of a child process")
        if self.runs == self.plan.get("crash_at"):
            sys.exit("planted crash: the roof fell in")


def tiled(config: Mapping[str, Any]) -> dict[str, float]:
    """Waits of a decoder: each layer by its tiles, the head by its width; a prefill like a step."""
    asked = config["planted"]
    tiles = math.ceil(config["intermediate_size"] / asked["tile"])
    layer_ms = 1.5 * tiles + 0.5 * config["num_key_value_heads"]
    wait_ms = 1 + config["hidden_size"] / 16 + layer_ms * config["num_hidden_layers"]
    wait_ms *= asked.get("pace", 1)
    return {"step_ms": wait_ms, "start_ms": wait_ms, "vocabulary": config["vocab_size"]}


class Planted:
    name = "planted"
    summary = "waits"
    precisions = ("slow", "quick")

    def missing(self) -> list[str]:
        return []

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        return list(checkpoint.config.get("problems", ()))

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        plan = checkpoint.config["planted"] | {"precision": precision}
        if "tile" in plan:
            plan |= tiled(checkpoint.config)
        (folder / FILE).write_text(json.dumps(plan), encoding="utf-8")

    def open(self, folder: Path, *, threads: int | None = None) -> Waiting:
        plan = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if plan.get("missing"):
            raise RuntimeMissingError("patience is not installed; install it")
        if plan.get("provider"):
            Waiting.providers = (plan["provider"],)
        return Waiting(plan)
