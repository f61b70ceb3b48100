"""Healing: what can be asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dotexport.errors import UsageError
from dotexport.models.text_options import parts_of
from dotexport.narrowing.narrow_options import LocalOptions

if TYPE_CHECKING:  # it takes seconds, and options are read without
    import torch

PRECISIONS = ("auto", "bf16", "fp32")
# Instructions that multiply bfloat16; without one of them the CPU takes it apart, ten times slower.
CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
MOST = 1 << 30  # steps, windows, tokens of one
MOST_TOKENS = 1 << 44  # to train on
# Where tokens are counted: of a window at most, of a step, and steps that are worth more than more
# tokens in each. A budget is spent on short windows, whose attention costs least.
WINDOW, STEP_TOKENS, LEAST_STEPS = 512, (2048, 16384), 150
EVALUATIONS = 16  # of a long run, about
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
# Of the tokens, to judge sizes behind; fewer than the least of these tell nothing.
TRIAL_SHARE, TRIAL_TOKENS = 1 / 10, (8192, 65536)
# Peak learning rate of a step of so many tokens: 11 over the square of the width, as measured on
# widths 64, 192 and 576 (docs/log.md), and no less than what wide models are finetuned with.
RATE_BY_AREA, LEAST_RATE, RATED_TOKENS = 11.0, 1e-5, 2048


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """Global healing: distillation of the whole narrowed model from its original.

    Attributes:
        steps: of the optimiser; or
        tokens: to train on, at least; it is known in `settled` how many steps that makes.
        batch: windows of a step; None: 4, or where tokens are counted as many as make 2,048 tokens,
            and up to 16,384 where 150 steps and more are left.
        seqlen: tokens of a training window; None: as long as those of calibration, and where tokens
            are counted 512 at most.
        text: other text to train on, as --calib takes it; None: that of calibration.
        samples: windows of the calibration text to train on, counted from where calibration
            begins; None: those of calibration. Its held-out windows are never trained on.
        rate: peak learning rate; None: by the width of the narrowed model and the tokens of a step.
        warmup: share of the steps over which the rate rises; then it falls in half a cosine.
        hidden_weight: of the distance between residual streams, beside the KL of predictions.
        weight_decay: of matrices, decoupled.
        clip: largest norm of a gradient.
        every: steps between two evaluations on held-out windows; None: 25, and more in a long run
            that counts tokens.
        precision: `bf16` or `fp32` for the steps; `auto` is bf16 where the device multiplies it.
        compiled: layers are compiled by torch.compile.
        seed: order of the windows.
    """

    steps: int | None = None
    tokens: int | None = None
    batch: int | None = None
    seqlen: int | None = None
    text: str | None = None
    samples: int | None = None
    rate: float | None = None
    warmup: float = 0.05
    hidden_weight: float = 3.0
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int | None = None
    precision: str = "auto"
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise UsageError("give healing a number of steps or of tokens, one of the two")
        if self.tokens is not None and not 1 <= self.tokens <= MOST_TOKENS:
            raise UsageError(
                f"tokens of healing must be from 1 to {MOST_TOKENS:,}, not {self.tokens}"
            )
        if self.text is not None:
            parts_of(self.text)
            if self.samples is not None:
                raise UsageError(
                    "--heal-samples counts windows of the calibration text, and --heal-text is "
                    "other text; give one of the two"
                )
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

    def settled(self, calibration: int, processes: int = 1) -> Schedule:
        """Steps, and what each of them reads, where windows of calibration have so many tokens.

        Raises:
            UsageError: windows of a step that so many processes cannot share evenly.
        """
        if self.tokens is None:
            steps, length, batch = self.steps, self.seqlen or calibration, self.batch or 4
            batch = self._shared(batch, processes)
        else:
            length = self.seqlen or min(calibration, WINDOW)
            low, high = STEP_TOKENS
            step_tokens = min(max(self.tokens // LEAST_STEPS, low), high)
            batch = self._shared(self.batch or max(1, step_tokens // length), processes)
            steps = math.ceil(self.tokens / (batch * length))
        assert steps is not None  # __post_init__
        long = 0 if self.tokens is None else steps // EVALUATIONS
        return Schedule(steps, batch, length, self.every or max(25, long), self.warmup)

    def _shared(self, batch: int, processes: int) -> int:
        """Windows of a step, as many for each process; more where the number is ours to choose."""
        if self.batch is not None and batch % processes:
            raise UsageError(
                f"{processes} processes cannot share {batch} windows of a step evenly; give a "
                "batch that is a multiple of the processes"
            )
        return -(-batch // processes) * processes

    def trial(self, calibration: int) -> HealOptions | None:
        """The same in short, on calibration text, by which sizes are judged; None: it is itself too
        short for that."""
        schedule = self.settled(calibration)
        least, most = TRIAL_TOKENS
        tokens = min(int(TRIAL_SHARE * schedule.steps * schedule.tokens_per_step), most)
        if tokens < least:
            return None
        return replace(
            self, steps=None, tokens=tokens, text=None, samples=None, every=MOST, compiled=False
        )

    def peak_rate(self, hidden_size: int, step_tokens: int) -> float:
        """`rate`, or what the width asks for."""
        return self.rate or rate_by_width(hidden_size, step_tokens)

    def chosen_precision(self, device: torch.device) -> str:
        return self.precision if self.precision != "auto" else native_precision(device)


def rate_by_width(hidden_size: int, step_tokens: float) -> float:
    """Adam's peak rate: the wider a model, the smaller the steps that it takes well; of more tokens
    larger ones, by the square root, as Adam's steps grow with a batch (arXiv 2205.10330)."""
    by_width = max(RATE_BY_AREA / hidden_size**2, LEAST_RATE)
    return by_width * math.sqrt(step_tokens / RATED_TOKENS)


@dataclass(frozen=True)
class Schedule:
    """Steps, and what each of them reads.

    Attributes:
        batch: windows of a step.
        length: tokens of a window.
        every: steps between two evaluations.
        warmup: share of the steps over which the rate rises.
    """

    steps: int
    batch: int
    length: int
    every: int
    warmup: float

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

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


def parse_heal(
    spec: str,
    *,
    text: str | None = None,
    samples: int | None = None,
    precision: str = "auto",
    compiled: bool = False,
    seed: int = 0,
) -> tuple[LocalOptions | None, HealOptions | None]:
    """`--heal`: `none`, `local`, a number of steps or with a suffix of tokens (`300k`, `20M`) of
    global healing, or `local+20M` for both.

    Raises:
        UsageError: anything else, or text for no global healing.
    """
    number = r"([1-9]\d{0,6}|\d{1,6}(?:\.\d{1,6})?[kKmMbB])"
    known = re.fullmatch(rf"none|(local)|(?:(local)\+)?{number}", spec.strip())
    if not known:
        raise UsageError(
            f"--heal {spec!r} is not known; expected none, local, a number of steps from 1 on or "
            "of tokens with k, M or B behind it, or local and one of these: --heal local+20M"
        )
    local = LocalOptions() if known[1] or known[2] else None
    if known[3] is None:
        if text is not None:
            raise UsageError(
                f"--heal-text is what the whole model is distilled on, and --heal {spec} does not "
                "do that; give a number of tokens, such as --heal 20M"
            )
        return local, None
    digits = known[3].rstrip("kKmMbB")
    suffix = known[3][len(digits) :].lower()
    counted: dict[str, Any] = {
        "tokens" if suffix else "steps": round(float(digits) * SUFFIXES[suffix])
    }
    how: dict[str, Any] = {"precision": precision, "compiled": compiled, "seed": seed}
    return local, HealOptions(**counted, text=text, samples=samples, **how)


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
