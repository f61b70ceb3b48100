"""What several processes (torchrun) send each other while they narrow, from config.json.

Sums over the text are added up, and what the first process makes of them goes to all. Counted as
narrowing/ makes them, once: what a network carries of it depends on how it adds up, by a ring about
twice of it into each process and out of it.

Shapes: D width of the stream before, K after, N inputs of a writer before, J after.
"""

from __future__ import annotations

from dotexport.axes.plan import Plan
from dotexport.models.family import Sublayer
from dotexport.models.shapes import Sizes
from dotexport.narrowing.narrow_options import LocalOptions
from dotexport.narrowing.streams import KINDS
from dotexport.sizes.effort import HELD_OUT

SUM = 8  # bytes of a number: float64
GRADIENT = 4


def exchanged_bytes(
    decided: Plan, *, samples: int = 128, seqlen: int = 2048, local: bool = True
) -> int:
    """Of a run with shrink's defaults, the choice of layers and of sizes aside.

    Args:
        local: with local healing.
    """
    before, after = decided.before, decided.after
    D, K = before.spaces["residual"], after.spaces["residual"]
    steps = LocalOptions().num_steps(round(samples * seqlen * (1 - HELD_OUT))) if local else 0
    layers = sum(
        after.layers_with(decided.family, sublayer)
        * (
            _readers(D, K)
            + _writers(sublayer, before, after)
            + _healed(sublayer, before, after, steps)
        )
        for sublayer in decided.family.sublayers
    )
    basis = (2 * before.num_layers + 1) * SUM * D**2 if K < D else 0
    tables = 4 * before.vocab_size * K * (1 if after.tied else 2)
    return round(layers) + _readers(D, K) + basis + tables


def _moments(inputs: int, outputs: int) -> int:
    return len(KINDS) * SUM * (inputs**2 + inputs * outputs)


def _readers(D: int, K: int) -> int:
    """Sums for what the original's readers saw, and the map that was fitted."""
    return _moments(K, D) + SUM * D * K


def _writers(sublayer: Sublayer, before: Sizes, after: Sizes) -> int:
    """Sums, what to fall back on where neurons leave, and what was fitted; for each expert."""
    K, total = after.spaces["residual"], 0
    for writer in sublayer.writers:
        N, J = (sizes.spaces[writer.in_] for sizes in (before, after))
        told = 2 if J < N else 1
        total += (_moments(N, K) + told * SUM * K * J) * after.copies(writer)
    return total


def _healed(sublayer: Sublayer, before: Sizes, after: Sizes, steps: int) -> int:
    """A gradient in every step, and the best of them."""
    inside = sublayer.writer.in_
    if sublayer.module == "self_attn" and before.spaces[inside] == after.spaces[inside]:
        return 0
    K = after.spaces["residual"]
    weights = sum(
        after.copies(reader) * sum(after.rows(reader)) * K for reader in sublayer.all_readers
    )
    weights += sum(after.copies(w) * after.spaces[w.in_] * K for w in sublayer.writers)
    return GRADIENT * weights * (steps + 1) if steps else 0
