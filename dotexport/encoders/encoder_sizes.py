"""How many layers, neurons and dimensions of the stream stay: given, or found by a budget.

A budget can be met by leaving out no layer and many neurons, one layer and fewer, and so on, each
of them in narrower and narrower streams; some of these are narrowed, and the one whose embeddings
are closest to the original's is taken. Which layers leave is decided one by one, by what is left of
the embeddings without each.

Attention heads leave with the stream alone: these classes compute head_dim as hidden_size / heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from dotexport.encoders.encoder_folder import Encoder, can_hold
from dotexport.encoders.encoder_options import AXES, SizeOptions
from dotexport.encoders.encoder_stream import head_dim, why_it_stays
from dotexport.encoders.encoder_walk import Progress, cut
from dotexport.encoders.kinds import of_layers
from dotexport.encoders.pooling import Pooling, dense_parameters, embed, mean_cosine, pools
from dotexport.encoders.sentences import Batch
from dotexport.errors import SizeError, UsageError
from dotexport.sizes.budget import parse_budget

STEP = 8
"""Widths of MLPs that a budget leads to are multiples of it."""
LEAST_HEADS = 0.5
"""Of the heads, so many stay at least where a budget decides."""


@dataclass(frozen=True)
class Sizes:
    """Neurons of every MLP, how many layers, and the width of the stream."""

    width: int
    depth: int
    hidden: int


def num_parameters(model: nn.Module) -> int:
    """Distinct weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of(encoder: Encoder) -> int:
    """Of the whole model, a linear layer behind its pooling included."""
    width = encoder.hidden_size
    return num_parameters(encoder.model) + dense_parameters(encoder, width, width)


def parameters_after(encoder: Encoder, sizes: Sizes) -> int:
    """Of the same at these sizes, counted on its stock class without any weights."""
    kind = encoder.kind
    settings: Any = copy.deepcopy(encoder.model.config)
    words = of_layers(encoder.config, range(sizes.depth))
    words |= {kind.width: sizes.width, kind.stream: sizes.hidden}
    words[kind.heads] = sizes.hidden // head_dim(encoder)
    for word, value in words.items():
        setattr(settings, word, value)
    with torch.device("meta"):
        whole = num_parameters(type(encoder.model)(settings))
    return whole + dense_parameters(encoder, sizes.hidden, encoder.hidden_size)


def before_of(encoder: Encoder) -> Sizes:
    """The original's."""
    writer = encoder.layers[0].get_submodule(encoder.kind.writer)
    return Sizes(int(writer.in_features), len(encoder.layers), encoder.hidden_size)  # type: ignore[arg-type]


def candidates(encoder: Encoder, options: SizeOptions, *, total: int) -> list[Sizes]:
    """Sizes that were asked for, or all those at which the budget is used up: the widest streams
    first, and of these the deepest.

    Args:
        total: parameters of the original, which may have more tokens.

    Raises:
        SizeError: no size meets the budget.
        UsageError: more than there is, or a stream that cannot be as narrow.
    """
    before = before_of(encoder)
    if options.params is None:
        given = (options.width, options.depth, options.hidden)
        whole = (before.width, before.depth, before.hidden)
        asked = Sizes(*(y if x is None else x for x, y in zip(given, whole, strict=True)))
        if not (1 <= asked.width <= before.width and 1 <= asked.depth <= before.depth):
            raise UsageError(
                f"{asked.width} neurons and {asked.depth} layers cannot stay of {before.width} and "
                f"{before.depth}; give at least 1 and at most that"
            )
        _check_stream(encoder, asked.hidden)
        return [asked]
    budget, fixed = _budget(encoder, options, total)
    streams = _streams(encoder, options)
    found = [x for hidden in streams for x in _meeting(encoder, hidden, budget, options)]
    if not found:
        width = STEP if _may_change(options, AXES[1]) else before.width
        depth = 1 if _may_change(options, AXES[2]) else before.depth
        least = min(parameters_after(encoder, Sizes(width, depth, hidden)) for hidden in streams)
        layers = "" if options.count == "layers" else "count the layers alone with --count layers, "
        raise SizeError(
            f"{budget:,} parameters cannot be met{_named(options)}: the least is {least:,} "
            f"({fixed:,} are of embeddings and heads); ask for more, {layers}or take tokens with "
            "--vocab"
        )
    return found


def _named(options: SizeOptions) -> str:
    return f" by {', '.join(options.named_axes)} alone" if options.named_axes else ""


def _may_change(options: SizeOptions, axis: str) -> bool:
    return options.named_axes is None or axis in options.named_axes


def _check_stream(encoder: Encoder, hidden: int) -> None:
    before, size = encoder.hidden_size, head_dim(encoder)
    if hidden == before:
        return
    if why := why_it_stays(encoder):
        raise UsageError(f"--hidden cannot change {encoder.home}: {why}")
    if not (size <= hidden <= before and hidden % size == 0):
        near = max(size, min(before, hidden // size * size))
        raise UsageError(
            f"--hidden {hidden} cannot stay of {before}: heads of {size} fill the stream; give a "
            f"multiple of {size}, such as {near}"
        )


def _streams(encoder: Encoder, options: SizeOptions) -> list[int]:
    """Widths of the stream that a budget may lead to, the widest first."""
    before, size = encoder.hidden_size, head_dim(encoder)
    named = options.named_axes
    if named is None:  # whoever reads token vectors would see it
        free = options.count == "all" and not pools(encoder) and not why_it_stays(encoder)
    else:
        free = AXES[0] in named
        if free and (why := why_it_stays(encoder)):
            raise UsageError(f"--axes {AXES[0]} cannot change {encoder.home}: {why}")
        if free and options.count == "layers":
            raise UsageError(
                f"--count layers leaves embeddings as they are, which {AXES[0]} changes; count all "
                "parameters"
            )
    if not free:
        return [before]
    least = max(1, round(LEAST_HEADS * before / size)) * size
    return list(range(before, least - 1, -size))


def _meeting(encoder: Encoder, hidden: int, budget: int, options: SizeOptions) -> Iterator[Sizes]:
    """For every depth the most neurons that the budget has room for, the deepest first; no less
    deep than where all neurons stay."""
    before = before_of(encoder)
    depths = range(before.depth, 0, -1) if _may_change(options, AXES[2]) else [before.depth]
    if not _may_change(options, AXES[1]):
        whole = (Sizes(before.width, depth, hidden) for depth in depths)
        yield from islice((x for x in whole if parameters_after(encoder, x) <= budget), 1)
        return
    most = before.width // STEP * STEP
    some = (1, min(2, before.depth))
    at = {
        (depth, width): parameters_after(encoder, Sizes(width, depth, hidden))
        for depth in some
        for width in (STEP, 2 * STEP)
    }
    one, two = (((at[n, 2 * STEP] - at[n, STEP]) // STEP, at[n, STEP]) for n in some)
    for depth in depths:
        # The first layer may have weights that the others lack; all others are alike.
        per_neuron = one[0] + (depth - 1) * (two[0] - one[0])
        least = one[1] + (depth - 1) * (two[1] - one[1])
        room = (budget - least) // per_neuron
        width = min(most, (STEP + room) // STEP * STEP)
        if width >= STEP:
            yield Sizes(width, depth, hidden)
        if width >= most:
            return


def _budget(encoder: Encoder, options: SizeOptions, total: int) -> tuple[int, int]:
    """Parameters of the whole model at most, and how many lie outside of the layers."""
    assert options.params is not None
    layers = num_parameters(encoder.layers)
    fixed = parameters_of(encoder) - layers
    if options.count == "layers":
        return fixed + parse_budget(options.params, layers), fixed
    return parse_budget(options.params, total), fixed


def choose_layers(
    encoder: Encoder,
    some: Sequence[Batch],
    pooling: Pooling,
    depth: int,
    progress: Progress = lambda stage, done, total: None,
) -> list[list[int]]:
    """Layers that stay when none leaves, one, and so on until `depth` stay; the first always does,
    because those that leave are answered for by the one before. What stays can be said by the stock
    class: the last layer can always leave."""
    kept = list(range(len(encoder.layers)))
    wanted_ND = embed(encoder.base, some, pooling)
    course = [kept]
    while len(kept) > depth:
        progress("leaving layers out", len(course), len(encoder.layers) - depth)
        tried = [[*kept[:n], *kept[n + 1 :]] for n in range(1, len(kept))]
        tried = [layers for layers in tried if can_hold(encoder.config, layers)]
        cosines = []
        for layers in tried:
            base: nn.Module = cut(encoder, layers).base_model  # type: ignore[assignment]
            cosines.append(mean_cosine(embed(base, some, pooling), wanted_ND))
        kept = tried[cosines.index(max(cosines))]
        course.append(kept)
    return course
