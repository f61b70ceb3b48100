"""What a training run can be asked for, the learning rate that follows, and the command again."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Sizes, schedule and seed of one run; the defaults are meant for an hour on two cores."""

    layers: int = 4
    intermediate: int = 512
    hidden: int = 256
    vocabulary: int = 4096
    steps: int = 9000
    batch: int = 8
    optimizer: str = "muon"
    lr: float = 3e-3
    muon_lr: float = 6e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.4
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    every: int = 500

    def __post_init__(self) -> None:
        if self.steps <= self.warmup:
            raise ValueError(f"steps must exceed the {self.warmup} warmup steps, not {self.steps}")
        if not 0 < self.decay_share < 1:
            raise ValueError(f"decay_share must lie between 0 and 1, not {self.decay_share}")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be 'muon' or 'adamw', not {self.optimizer!r}")


def warmup_stable_decay(step: int, options: TrainOptions) -> float:
    """The factor of the learning rate: up, level, then a straight line down to 0."""
    left = (options.steps - step) / (options.decay_share * options.steps)
    return min(1.0, (step + 1) / options.warmup, left)


def command_line(options: TrainOptions) -> str:
    """The command that repeats this run; only what differs from the defaults is spelled out."""
    words = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in asdict(options).items()
        if value != getattr(TrainOptions, name)
    ]
    return " ".join(["python -m dotexport.embedded.train", *words])
