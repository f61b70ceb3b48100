"""How a latency table is measured: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.options import option


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What is measured, and how long.

    Attributes:
        target, precision: runtime and type of the artifacts; None: the default of the target.
        batches: sequences at once, each measured.
        prompt, generate: tokens of a prompt, and after it.
        threads: CPU threads; None: one per physical core.
        points: sizes of each axis, the original's among them.
        least: the smallest share of an axis that is measured.
        layers: measured depth; None: all, or as many as `budget` holds.
        budget: bytes of float32 weights up to which all layers are measured.
        rounds: A B B A groups for each size.
        held_out: sizes that are measured to judge the table and are not put into it.
        seed: of token ids and of the choice of these.
    """

    target: str = option(
        "ort-cpu", help="NAME or NAME:PRECISION of the runtime to measure; hf is torch."
    )
    precision: str | None = option(None, help="Precision of the artifacts.")
    batches: tuple[int, ...] = (1,)
    prompt: int = option(64, help="Tokens of a prompt.")
    generate: int = option(32, help="Tokens generated.")
    threads: int | None = option(None, help="CPU threads; default: one per physical core.")
    points: int = option(5, help="Sizes of each axis, the original's among them.")
    least: float = option(0.5, help="The narrowest, as a share of each axis.")
    layers: int | None = option(
        None, help="Layers to measure; default: all, or what 256 MB hold in float32."
    )
    budget: int = 256_000_000
    rounds: int = option(4, help="A B B A turns of each size, in fresh processes.")
    held_out: int = option(3, help="Other sizes, measured to see how far the table is off.")
    seed: int = option(0, help="Of token ids and held-out sizes.")

    def __post_init__(self) -> None:
        leasts = {"points": 2, "rounds": 2, "held_out": 0, "layers": 1, "prompt": 1, "seed": 0}
        # Two tokens: with one there is no time per output token to speak of.
        leasts |= {"generate": 2, "threads": 1}
        for name, least in leasts.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{name.replace('_', '-')} is {value}; expected at least {least}")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise UsageError(f"batch {self.batches} must be different numbers of at least 1")
        if not 0 < self.least < 1:
            raise UsageError(f"least is {self.least}; expected a share between 0 and 1")
