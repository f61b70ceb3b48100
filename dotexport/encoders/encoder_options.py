"""How an encoder is narrowed and judged: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.models.text_options import SOURCES
from dotexport.options import check_least, group, option
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

METHODS = ("dot", "obs", "select")
COUNTS = ("all", "layers")
AXES = ("hidden_size", "intermediate_size", "num_hidden_layers")


@dataclass(frozen=True, kw_only=True)
class SentenceOptions:
    """Which sentences are read, one after another, from running text; or which rows of a task."""

    source: str = option(
        help="Text, cut into sentences; or rows of a task as .jsonl, by GLUE's and SQuAD's names "
        f"(sentence1 and sentence2, question and context, ...), read as pairs. {SOURCES}",
        flag="text",
    )
    samples: int = option(1024, help="Sentences, at most.")
    seqlen: int = option(128, help="Tokens of one, at most.")
    batch: int = option(32, help="Sentences at once.")

    def __post_init__(self) -> None:
        check_least(self, samples=16, seqlen=4, batch=1)


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How narrow.

    Attributes:
        params: budget, `0.7x` or a number.
        count: what the budget counts.
        width, depth, hidden: sizes that are given instead.
        axes: sizes that a budget may change, with commas between; None: as the model allows.
    """

    params: str | None = option(None, help="Budget: 0.7x of the parameters, or 15M.")
    count: str = option(
        "all",
        help="What --params counts: all parameters, or those of the layers (embeddings and heads "
        "stay).",
    )
    width: int | None = option(
        None,
        help="Neurons of an MLP that stay (hidden_dim of DistilBERT).",
        flag="intermediate",
    )
    depth: int | None = option(None, help="Layers that stay.", flag="layers")
    hidden: int | None = option(
        None,
        help="Width of the stream, a multiple of that of a head: heads leave with it. A folder of "
        "sentence-transformers gets a linear layer behind its pooling, back to the original's "
        "embeddings.",
    )
    axes: str | None = option(
        None,
        help=f"Sizes that --params may change, of {','.join(AXES)}; by default all, and "
        "hidden_size where nothing but a head reads the stream.",
    )
    vocabulary: VocabularyOptions = group(VocabularyOptions)

    def __post_init__(self) -> None:
        if self.count not in COUNTS:
            raise UsageError(f"--count {self.count} is not known; expected {', '.join(COUNTS)}")
        sized = (self.width, self.depth, self.hidden) != (None, None, None)
        if strange := set(self.named_axes or ()) - set(AXES):
            raise UsageError(f"--axes {sorted(strange)[0]} is none of {', '.join(AXES)}")
        if self.axes is not None and not self.named_axes:
            raise UsageError(f"--axes names nothing; expected some of {', '.join(AXES)}")
        if self.axes is not None and self.params is None:
            raise UsageError("--axes says what --params may change; give a budget with it")
        if (self.params is not None and sized) or not (self.narrows or self.vocabulary.asked):
            raise UsageError(
                "say how narrow: either --params 0.7x, or --intermediate, --layers and --hidden; "
                "or which tokens stay, with --vocab or --vocab-for, alone or besides"
            )

    @property
    def narrows(self) -> bool:
        """Whether layers are changed: the vocabulary alone is cut exactly."""
        return (self.params, self.width, self.depth, self.hidden) != (None,) * 4

    @property
    def named_axes(self) -> tuple[str, ...] | None:
        """Those of --axes."""
        if self.axes is None:
            return None
        return tuple(word.strip() for word in self.axes.split(",") if word.strip())


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions(SizeOptions):
    """How an encoder is narrowed.

    Attributes:
        method: `dot` merges neurons that leave into kept ones, `obs` leaves that out, `select`
            takes those that contribute most and repairs nothing: the baseline.
        heal: steps of distillation.
    """

    text: SentenceOptions = group(source={"key": "calib"})
    method: str = option(
        "dot",
        help="dot, obs (no merging), or select (largest neurons, no repair: a baseline).",
        flag="mlp",
    )
    heal: int = option(
        0, help="Steps of distillation on hidden states, embeddings and a head's answers."
    )
    seed: int = option(0, help="Same seed, same bytes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise UsageError(f"--mlp {self.method} is not known; expected {', '.join(METHODS)}")
        if self.heal < 0:
            raise UsageError(f"--heal must not be negative, not {self.heal}")
