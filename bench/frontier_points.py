"""What a frontier is made of: models in precisions, and what each makes of the texts."""

from __future__ import annotations

from dataclasses import dataclass

from .workload import Workload

SCHEMA = "dotexport.frontier/2"
REPORT = "frontier.json"
ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class OnText:
    """What one artifact makes of one text.

    Attributes:
        kl: mean over predictions of KL(original in float32 || artifact), in nats; None for a rival,
            whose tokens may be others.
        perplexity: exp of the mean nats of a token.
        bits_per_byte: of the text that the predicted tokens spell.
    """

    source: str
    num_tokens: int
    kl: float | None
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in one precision.

    Attributes:
        model: "original", or the name of an output or of a rival.
        rival: a model of somebody else, which is held against by bits per byte.
        texts: that of --text, then that of --other.
        prefill_tok_s, decode_tok_s: of each round; empty: not timed.
        peak_rss_bytes: most that the process ever held; None: not timed.
    """

    model: str
    precision: str
    num_bytes: int
    num_parameters: int
    texts: tuple[OnText, ...]
    prefill_tok_s: tuple[float, ...] = ()
    decode_tok_s: tuple[float, ...] = ()
    peak_rss_bytes: int | None = None
    rival: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} in {self.precision}"

    def beats(self, other: Point) -> bool:
        """No more bytes and no further from the original on any text, and less in one of these."""
        return _ahead(self, other, "kl")

    def reads_better(self, other: Point) -> bool:
        """No more bytes and no more bits per byte of any text, and less in one of these."""
        return _ahead(self, other, "bits_per_byte")


def _ahead(one: Point, other: Point, figure: str) -> bool:
    mine, theirs = (
        (p.num_bytes, *(getattr(text, figure) for text in p.texts)) for p in (one, other)
    )
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All artifacts that could be made, and why others could not."""

    target: str
    points: tuple[Point, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    workload: Workload | None

    @property
    def best(self) -> tuple[Point, ...]:
        """The Pareto set of original and narrowed: what no other one beats."""
        points = [point for point in self.points if not point.rival]
        return tuple(p for p in points if not any(q.beats(p) for q in points))
