"""Healing: what can be asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dotexport.errors import UsageError
from dotexport.narrowing.narrow_options import LocalOptions

if TYPE_CHECKING:  # it takes seconds, and options are read without
    import torch

PRECISIONS = ("auto", "bf16", "fp32")
# Instructions that multiply bfloat16; without one of them the CPU takes it apart, ten times slower.
CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
MOST = 1 << 30  # steps, windows, tokens of one
RATE_BY_WIDTH = 0.2  # measured on widths 64 and 192: three times as much is too much


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """Global healing: distillation of the whole narrowed model from its original.

    Attributes:
        steps: of the optimiser.
        batch: windows of a step.
        seqlen: tokens of a training window; None: as long as those of calibration.
        samples: windows of the calibration text to train on, counted from where calibration
            begins; None: those of calibration. Its held-out windows are never trained on.
        rate: peak learning rate; None: RATE_BY_WIDTH / hidden_size of the narrowed model.
        warmup: share of the steps over which the rate rises; then it falls in half a cosine.
        hidden_weight: of the distance between residual streams, beside the KL of predictions.
        weight_decay: of matrices, decoupled.
        clip: largest norm of a gradient.
        every: steps between two evaluations on held-out windows.
        precision: `bf16` or `fp32` for the steps; `auto` is bf16 where the device multiplies it.
        seed: order of the windows.
    """

    steps: int
    batch: int = 4
    seqlen: int | None = None
    samples: int | None = None
    rate: float | None = None
    warmup: float = 0.05
    hidden_weight: float = 3.0
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int = 25
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        leasts = {"steps": 1, "batch": 1, "seqlen": 2, "samples": 1, "every": 1, "seed": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} of healing must be at least {least}, not {value}")
            if value is not None and value > MOST:
                raise UsageError(f"{name} of healing must be at most {MOST:,}, not {value}")
        for name in ("rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} of healing must be positive, not {value}")
        for name in ("hidden_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} of healing must not be negative")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup of healing must be a share below 1, not {self.warmup}")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision of healing must be one of {', '.join(PRECISIONS)}, "
                f"not {self.precision!r}"
            )

    @property
    def evaluations(self) -> frozenset[int]:
        """The steps after which held-out windows are looked at; the last is one of them."""
        return frozenset({*range(0, self.steps, self.every), self.steps})

    def factor(self, step: int) -> float:
        """Of the peak learning rate: a straight line up, then half a cosine down to 0."""
        rise = self.warmup * self.steps
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise)))

    def peak_rate(self, hidden_size: int) -> float:
        """The wider a model, the smaller the steps that it takes well."""
        return self.rate or RATE_BY_WIDTH / hidden_size

    def chosen_precision(self, device: torch.device) -> str:
        return self.precision if self.precision != "auto" else native_precision(device)


def parse_heal(
    spec: str, *, samples: int | None = None, precision: str = "auto", seed: int = 0
) -> tuple[LocalOptions | None, HealOptions | None]:
    """`--heal`: `none`, `local`, a number of global steps, or `local+200` for both.

    Raises:
        UsageError: anything else.
    """
    known = re.fullmatch(r"none|(local)|(?:(local)\+)?([1-9]\d{0,6})", spec.strip())
    if not known:
        raise UsageError(
            f"--heal {spec!r} is not known; expected none, local, a number of steps from 1 on, or "
            "both, such as --heal local+200"
        )
    local = LocalOptions() if known[1] or known[2] else None
    if known[3] is None:
        return local, None
    return local, HealOptions(steps=int(known[3]), samples=samples, precision=precision, seed=seed)


def native_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it, fp32 elsewhere.

    Asked of the machine and not timed: a time near the limit would give one run this precision
    and the next run that one.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Old releases of torch cannot say; float32 is right on every machine.
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(known.get(name) for name in CPU_BF16)
    return "bf16" if native else "fp32"
