"""What the shrink verb can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from dotexport.axes.plan import SizeOptions
from dotexport.errors import UsageError
from dotexport.healing.heal_options import HealOptions
from dotexport.models.text_options import SELF, TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

ALLOCATIONS = ("measured", "rule")
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions:
    """How narrow, and how.

    Attributes:
        sizes: explicit sizes, or a budget.
        vocabulary: which tokens stay.
        text: calibration text.
        other: a second text, of another kind, that is half of what is fitted on and of what is
            judged by (generation/second_text.py).
        narrow: methods.
        allocate: how a budget is shared between the axes: `measured` cuts each axis alone and looks
            (sizes/allocation.py), `rule` reads config.json only.
        heal: distillation after the closed form; None: none.
        max_shard_bytes: largest weight file.
    """

    sizes: SizeOptions = field(default_factory=SizeOptions)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    text: TextOptions
    other: str = SELF
    narrow: NarrowOptions = field(default_factory=NarrowOptions)
    allocate: str = "measured"
    heal: HealOptions | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.allocate not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise UsageError(f"allocate must be one of {known}, not {self.allocate!r}")
