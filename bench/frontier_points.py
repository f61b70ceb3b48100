"""What a frontier is made of: models in precisions, and what each makes of the texts."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Generic, Protocol, TypeVar

SCHEMA = "dotexport.frontier/2"
REPORT = "frontier.json"
ORIGINAL = "original"


class Timed(Protocol):
    """What was timed."""

    def as_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class OnText:
    """What one artifact makes of one text.

    Attributes:
        kl: mean over predictions of KL(original in float32 || artifact), in nats; None for a rival,
            whose tokens may be others.
        perplexity: exp of the mean nats of a token.
        bits_per_byte: of the text that the predicted tokens spell.
    """

    measure: ClassVar = "KL"
    drawn: ClassVar = "KL, nats"

    source: str
    num_tokens: int
    kl: float | None
    perplexity: float
    bits_per_byte: float

    @property
    def distance(self) -> float | None:
        """From the original; less is better."""
        return self.kl

    @property
    def figures(self) -> dict[str, float | None]:
        return {"KL": self.kl, "perplexity": self.perplexity, "bits/byte": self.bits_per_byte}


@dataclass(frozen=True, kw_only=True)
class OnSentences:
    """What one artifact of a text encoder makes of the sentences of one text.

    Attributes:
        cosine: mean, of its embeddings to those of the original in float32.
        recall_at_10: share of the original's nearest sentences that are among its own nearest.
    """

    measure: ClassVar = "cosine"
    drawn: ClassVar = "1 - cosine"

    source: str
    num_sentences: int
    cosine: float
    recall_at_10: float

    @property
    def distance(self) -> float:
        """From the original; less is better. Embeddings of one model may add up to more than 1."""
        return max(1 - self.cosine, 0.0)

    @property
    def figures(self) -> dict[str, float | None]:
        return {"cosine": self.cosine, "recall@10": self.recall_at_10}


@dataclass(frozen=True, kw_only=True)
class OnAnswers:
    """What one artifact of an encoder with a task head answers to the sentences of one text.

    Attributes:
        agreement: share in which it names what the original in float32 names.
        kl: mean KL(original || artifact) of what is answered, in nats.
    """

    measure: ClassVar = "KL"
    drawn: ClassVar = "KL, nats"

    source: str
    num_sentences: int
    agreement: float
    kl: float

    @property
    def distance(self) -> float:
        """From the original; less is better."""
        return max(self.kl, 0.0)

    @property
    def figures(self) -> dict[str, float | None]:
        return {"KL": self.kl, "agreement": self.agreement}


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One model in one precision.

    Attributes:
        model: "original", or the name of an output or of a rival.
        rival: a model of somebody else, which is held against by bits per byte.
        texts: that of --text, then that of --other.
        peak_rss_bytes: most that the process ever held; None: not asked.
    """

    unit: ClassVar = ""

    model: str
    precision: str
    num_bytes: int
    num_parameters: int
    texts: tuple[Any, ...]
    peak_rss_bytes: int | None = None
    rival: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} in {self.precision}"

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """By what is timed: how many of `unit` in each round; empty: not timed."""
        return {}

    @property
    def distance(self) -> float:
        """From the original, the mean over texts."""
        return fmean(text.distance or 0.0 for text in self.texts)

    def beats(self, other: Artifact) -> bool:
        """No more bytes and no further from the original on any text, and less in one of these."""
        return _ahead(self, other, "distance")


@dataclass(frozen=True, kw_only=True)
class Point(Artifact):
    """Of a decoder.

    Attributes:
        prefill_tok_s, decode_tok_s: of each round; empty: not timed.
    """

    unit: ClassVar = "tokens/s"

    texts: tuple[OnText, ...]
    prefill_tok_s: tuple[float, ...] = ()
    decode_tok_s: tuple[float, ...] = ()

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        return {"prefill": self.prefill_tok_s, "decode": self.decode_tok_s}

    def reads_better(self, other: Point) -> bool:
        """No more bytes and no more bits per byte of any text, and less in one of these."""
        return _ahead(self, other, "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class EncoderPoint(Artifact):
    """Of a text encoder.

    Attributes:
        sentences_s: of each round, in full batches; empty: not timed.
    """

    unit: ClassVar = "sentences/s"

    texts: tuple[OnSentences | OnAnswers, ...]
    sentences_s: tuple[float, ...] = ()

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        return {"embedding": self.sentences_s}


def _ahead(one: Artifact, other: Artifact, figure: str) -> bool:
    mine, theirs = (
        (p.num_bytes, *(getattr(text, figure) for text in p.texts)) for p in (one, other)
    )
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


Kind = TypeVar("Kind", bound=Artifact)


@dataclass(frozen=True, kw_only=True)
class Frontier(Generic[Kind]):
    """All artifacts that could be made, and why others could not."""

    target: str
    points: tuple[Kind, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    workload: Timed | None

    @property
    def best(self) -> tuple[Kind, ...]:
        """The Pareto set of original and narrowed: what no other one beats."""
        points = [point for point in self.points if not point.rival]
        return tuple(p for p in points if not any(q.beats(p) for q in points))
