"""How a model is narrowed: what can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dotexport.errors import UsageError
from dotexport.merging.transport_options import TransportOptions
from dotexport.options import group, option

MERGE_METHODS = ("dot", "obs", "select")
BASES = ("dot", "learned", "obs", "pca", "select")
PASSES = ("auto", "bfloat16", "float32")
LARGEST_SEED = (1 << 63) - 1  # that torch takes
AUTO = "auto"
"""All bases that a class allows are measured."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How long and how fast.

    Attributes:
        passes: over the calibration tokens that are not held out.
        least_steps: at least so many steps, however little text there is.
        tokens: of one step.
        learning_rate: of Adam, in units of each tensor's root mean square.
        checks: how often held-out windows are looked at; the best state is kept.
    """

    passes: float = 2.0
    least_steps: int = 64
    tokens: int = 2048
    learning_rate: float = 0.05
    checks: int = 4

    def __post_init__(self) -> None:
        if min(self.passes, self.least_steps, self.tokens, self.learning_rate, self.checks) <= 0:
            raise UsageError(f"healing options must be positive, not {self}")

    def num_steps(self, tokens: int) -> int:
        return max(self.least_steps, math.ceil(self.passes * tokens / self.tokens))


@dataclass(frozen=True, kw_only=True)
class NarrowOptions:
    """How neurons are merged.

    Attributes:
        basis: of the residual stream, one of `dot`, `learned`, `pca`, `select`; or `auto`, which
            measures all on held-out windows and takes the best. None: `learned`, or `pca` for a
            head that stays tied, which is a reader that no refit can change. Where the stream
            cannot be rotated, one of `dot`, `obs`, `select`; None: `dot`.
        mlp: `dot` (OBS chooses the targets, transport merges the rest into them), `obs` (the
            choice alone), `select` (largest magnitude). Without refit nothing can judge a merge,
            and `dot` is `obs`.
        heads: the same for KV groups and their query heads.
        refit: closed-form least squares against the original's activations, layer after layer.
        feedback: writers answer for what earlier sublayers got wrong, too; else only for their own.
        ridge: of every solve, in units of the mean diagonal of its Gram matrix; None: per solve the
            one that is best on held-out windows.
        transport: how plans are found.
        local: steps on each narrowed sublayer's own weights after its refit; None takes none.
        passes: dtype of the products of a pass through a layer, `bfloat16` or `float32`; `auto`:
            bfloat16 where weights are stored in it, the device multiplies it natively and
            hidden_size is at least 512. Streams, norms, sums and solves are not touched by it.
        seed: which tokens steps of local healing take; of distillation, which windows.
    """

    basis: str | None = option(
        None,
        help="Of the residual stream: learned, pca, dot, select, or auto, which measures all; "
        "default: learned, or pca where the head stays tied. Gemma 2 and 3, OLMo 2: dot (the "
        "default), obs, select, auto.",
    )
    mlp: str = option(
        "obs", help="Neurons: obs, dot (OBS, then transport if refitted), select (magnitude)."
    )
    heads: str = option("obs", help="KV groups: obs, dot, select; as for --mlp.")
    transport: TransportOptions = group(TransportOptions)
    refit: bool = option(
        True, help="Closed-form least-squares repair.", words=("--refit/--no-refit",)
    )
    feedback: bool = option(
        True, help="Writers repair earlier drift, too.", words=("--feedback/--no-feedback",)
    )
    ridge: float | None = option(
        None, help="Of every refit; default: per solve the best on held-out windows."
    )
    local: LocalOptions | None = field(default_factory=LocalOptions)
    passes: str = option(
        "auto",
        help="Products of passes over the text: bfloat16 (faster), float32 (exact), or auto: "
        "bfloat16 for weights stored so, hidden sizes from 512 on, and devices that have it.",
    )
    seed: int = option(0, help="Same seed, same bytes.")

    def __post_init__(self) -> None:
        for axis in ("mlp", "heads"):
            if (method := getattr(self, axis)) not in MERGE_METHODS:
                known = ", ".join(MERGE_METHODS)
                raise UsageError(f"{axis} must be one of {known}, not {method!r}")
        if self.basis not in (None, *BASES, AUTO):
            known = ", ".join((*BASES, AUTO))
            raise UsageError(f"basis must be one of {known}, not {self.basis!r}")
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise UsageError(f"ridge must be at least 0, not {self.ridge}")
        if self.passes not in PASSES:
            known = ", ".join(PASSES)
            raise UsageError(f"passes must be one of {known}, not {self.passes!r}")
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}")
        if self.seed > LARGEST_SEED:
            raise UsageError(f"seed must be at most {LARGEST_SEED}, not {self.seed}")
