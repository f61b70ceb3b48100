"""What narrowing needs of memory at its peak, from sizes alone.

Shapes: I inputs of the widest refit, K width after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dotexport.axes.plan import Plan
from dotexport.models.family import Family
from dotexport.models.memory import fits
from dotexport.models.shapes import Sizes, layer_parameters, lent_numbers
from dotexport.narrowing.prepare import WIDE, multiplies_bfloat16, pick_device
from dotexport.narrowing.streams import TOKENS_PER_BATCH

WINDOW = 2048  # tokens, or the model's context
LOADED = 700_000_000  # an interpreter with torch and transformers, before any model
# At once while neurons are chosen: matrices (I, I) of float64, two halves and one that is factored,
# and arrays as large as the writer, (I, K): cross moments of three sums, a residual, a solution.
SOLVED, WRITERS = 2, 5
STORED = 2  # bytes of a number in a table of inputs of layers
NEW = 8  # one in so many tokens of a text is another than those before, at most
ACTIVATIONS = 5  # arrays of a batch of tokens and all neurons at once, in float32


def shrink_memory(
    config: Mapping[str, Any],
    decided: Plan,
    *,
    samples: int = 128,
    seqlen: int = WINDOW,
    processes: int = 1,
) -> int:
    """Estimated peak of narrowing, with calibration text of shrink's defaults.

    Both streams over the text with what lies beside them (models/beside.py), and either a table in
    both widths in float32 (the original's twice), or a layer, whose original is let go of as its
    stream passes, with the widest refit: sums in float64, half of each matrix (merging/gram.py),
    and a batch of activations or what is solved.
    Streams beyond a quarter of the free memory lie on disk instead (narrowing/streams.py). Before
    that the original is there as a whole, where it fits, and says the second text. Of several
    processes each has its share of the streams; this is the first one's.
    """
    before, after = decided.before, decided.carried_after
    tokens = math.ceil(samples / processes) * min(seqlen, usual_window(config))
    stream, narrower = before.spaces["residual"], after.spaces["residual"]
    # What experts still lack is a stream of its own while they are fitted one after another.
    streams = 4 * tokens * (stream + narrower * (2 if before.mixture else 1))
    streams += (
        4 * tokens * sum(lent_numbers(decided.family, sizes) for sizes in (before, decided.after))
    )
    if given := decided.family.per_layer:
        row = STORED * before.spaces[given.projection.out] + 4 * (stream + narrower)
        streams += min(before.vocab_size, tokens // NEW) * row
    table = 4 * before.vocab_size * (2 * stream + narrower)
    kinds = map(decided.family.linears_in, before.each_kind)
    inside = {"residual", *(linear.in_ for linears in kinds for linear in linears)}
    widest = max(before.spaces[space] for space in inside)
    square, writer = 8 * widest**2, 8 * widest * narrower
    passing = square + 2 * writer + 4 * ACTIVATIONS * min(tokens, TOKENS_PER_BATCH) * widest
    solving = SOLVED * square + WRITERS * writer
    layer = 4 * _layer(decided.family, before)
    device = pick_device("auto")
    short = stream >= WIDE and multiplies_bfloat16(device)
    whole = decided.parameters_before * (2 if short else 4)
    sampling = whole if fits(whole, device) else 0
    return LOADED + max(sampling, streams + max(table, layer + max(passing, solving)))


def usual_window(config: Mapping[str, Any]) -> int:
    """Tokens of a window where nothing else is asked for."""
    return min(WINDOW, int(config.get("max_position_embeddings") or WINDOW))


def _layer(family: Family, sizes: Sizes) -> int:
    """Parameters of one layer, of the largest where they differ."""
    return max(layer_parameters(family, sizes, kind) for kind in sizes.each_kind)
