"""How a pipeline is pruned: what can be asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dotexport.errors import UsageError
from dotexport.options import group, option

METHODS = ("obs", "dot", "l1", "l1-refit", "wanda", "random")
SCHEDULES = ("uniform", "linear", "log")
ALLOCATIONS = ("uniform", "loss")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How the pipeline is called.

    Attributes:
        prompts: file with one prompt (or class label) per line.
        limit: prompts that are read, at most.
        steps: of the scheduler.
        guidance: guidance scale; None is the pipeline's own.
        batch: pictures at once.
        height, width: in pixels; None is the pipeline's own.
        extra: further arguments of the pipeline's call.
    """

    prompts: str = option(
        help="File with one prompt per line (or class label, for class-conditional).", flag="text"
    )
    limit: int = option(100, help="Prompts that are used, at most.", flag="samples")
    steps: int = option(25, help="Steps of the pipeline's own scheduler.")
    guidance: float | None = option(
        None, help="Guidance scale of real use; default: the pipeline's."
    )
    batch: int = option(4, help="Pictures at once.")
    height: int | None = option(None, help="Pixels; default: the pipeline's.")
    width: int | None = option(None, help="Pixels; default: the pipeline's.")
    seed: int = option(0, help="Same seed, same bytes.")
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("limit", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, not {getattr(self, name)}")


def parse_extra(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE; a value is JSON, or else text.

    >>> parse_extra(["max_sequence_length=1", "negative_prompt=blurry"])
    {'max_sequence_length': 1, 'negative_prompt': 'blurry'}
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--pipeline-arg {pair} cannot be read; expected NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


@dataclass(frozen=True, kw_only=True)
class TimestepWeights:
    """How much each step counts; t = 1 is the noisiest of T.

    `log`, the default, is OBS-Diff's (arXiv 2510.06751): low + (high - low) ln(T - t + 1) / ln(T).
    """

    schedule: str = option(
        "log",
        help="How steps count: log (early ones more), linear, uniform.",
        flag="timestep_weights",
    )
    low: float = 0.8
    high: float = 1.2

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"--timestep-weights {self.schedule} is not known; expected {', '.join(SCHEDULES)}"
            )
        if not 0 < self.low <= self.high:
            raise UsageError(f"timestep weights from {self.low} to {self.high} are no range")

    def at(self, t: int, steps: int) -> float:
        """Weight of step t.

        >>> [round(TimestepWeights().at(t, 25), 3) for t in (1, 13, 25)]
        [1.2, 1.119, 0.8]
        """
        if self.schedule == "uniform" or steps < 2:
            return 1.0
        share = (steps - t) / (steps - 1)
        if self.schedule == "log":
            share = math.log(steps - t + 1) / math.log(steps)
        return self.low + (self.high - self.low) * share


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How units are chosen and repaired.

    Attributes:
        method: `obs`, `dot` (obs, then feed-forward neurons merged), or a baseline.
        damping: of the Hessian, in units of its mean diagonal.
        packages: runs of layers that are calibrated together.
        feedback: aim at what the dense model says, not at what the model pruned so far says.
        weights: how much each step counts.
    """

    method: str = option(
        "obs",
        help="obs (exact group Optimal Brain Surgeon), dot (obs, then removed neurons are "
        "transported onto kept ones), or a baseline: l1, l1-refit, wanda, random.",
    )
    damping: float = 1e-4
    packages: int = option(4, help="Runs of layers calibrated together; more: slower, less memory.")
    feedback: bool = option(
        False,
        help="Layers aim at what the dense model says, so that later ones repair earlier ones.",
        words=("--feedback/--no-feedback",),
    )
    weights: TimestepWeights = group(TimestepWeights)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method} is not known; expected {', '.join(METHODS)}")
        if not 0 < self.damping <= 1 or self.packages < 1:
            raise UsageError("damping must lie between 0 and 1, --packages be at least 1")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """What is asked for, and how it is shared between blocks.

    Attributes:
        params: budget for the denoiser's parameters, `0.75x` or a number.
        heads, ffn: share of the heads and of the feed-forward neurons that stays, such as `0.75x`.
        file: JSON with the units to keep, by site.
        allocation: `uniform`, or `loss`: where the predicted loss is least.
    """

    params: str | None = None
    heads: str | None = None
    ffn: str | None = None
    file: str | None = None
    allocation: str = "loss"

    def __post_init__(self) -> None:
        asked = [self.params is not None, bool(self.heads or self.ffn), self.file is not None]
        if sum(asked) != 1:
            raise UsageError(
                "say how much to keep, in one way: --params 0.75x, or --heads 0.75x and/or "
                "--ffn 0.75x, or --layout FILE"
            )
        if self.allocation not in ALLOCATIONS:
            raise UsageError(
                f"--allocation {self.allocation} is not known; expected {', '.join(ALLOCATIONS)}"
            )
        for ratio in (self.heads, self.ffn):
            if ratio is not None:
                parse_share(ratio)


def parse_share(text: str) -> float:
    """Read `0.75x` or `0.75`: the share that stays.

    Raises:
        UsageError: not a share, or one that leaves everything or nothing.
    """
    found = re.fullmatch(r"(\d*\.?\d+)x?", text)
    if not found:
        raise UsageError(f"{text!r} is no share; expected such as 0.75x")
    if not 0 < float(found[1]) < 1:
        raise UsageError(
            f"{text} would keep {'everything' if float(found[1]) >= 1 else 'nothing'}; expected a "
            "share between 0 and 1, such as 0.75x"
        )
    return float(found[1])


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions:
    """What stays, how the rest is chosen, and what the model is calibrated on.

    Attributes:
        layout: units to keep; None with `sparsity`.
        sparsity: zeros instead of smaller layers, `0.5`, `2:4` or `4:8`.
    """

    sampling: SampleOptions
    layout: LayoutOptions | None = None
    sparsity: str | None = None
    prune: PruneOptions = field(default_factory=PruneOptions)

    def __post_init__(self) -> None:
        if (self.layout is None) == (self.sparsity is None):
            raise UsageError("say either which units stay (--params, ...) or --sparsity")
        if self.sparsity is not None:
            from dotexport.diffusion.sparse import Pattern  # needs torch

            Pattern.parse(self.sparsity)


@dataclass(frozen=True, kw_only=True)
class PruneStep:
    """Flags of `dotexport shrink` for a pipeline."""

    sampling: SampleOptions = group(prompts={"key": "calib"})
    params: str | None = option(None, help="Budget for the denoiser: 0.75x, 2.5B, 6e9.")
    heads: str | None = option(None, help="Attention heads that stay: 0.75x.")
    ffn: str | None = option(None, help="Feed-forward neurons that stay: 0.75x.")
    layout: str | None = option(
        None,
        help='JSON file with the units to keep: {"transformer_blocks.0.attn": 3}.',
    )
    sparsity: str | None = option(
        None,
        help="Zeros instead of smaller layers: 0.5, 2:4, 4:8. Saves neither time nor bytes in "
        "ONNX Runtime or torch without special kernels.",
    )
    allocation: str = option(
        "loss", help="Between blocks: loss (where the predicted loss is least) or uniform."
    )
    prune: PruneOptions = group(PruneOptions)

    def options(self, extra: Mapping[str, Any]) -> ShrinkOptions:
        """Args: extra: further arguments of the pipeline's call."""
        layout = (
            LayoutOptions(
                params=self.params,
                heads=self.heads,
                ffn=self.ffn,
                file=self.layout,
                allocation=self.allocation,
            )
            if self.sparsity is None
            else None
        )
        return ShrinkOptions(
            sampling=replace(self.sampling, extra=extra),
            layout=layout,
            sparsity=self.sparsity,
            prune=replace(self.prune, seed=self.sampling.seed),
        )
