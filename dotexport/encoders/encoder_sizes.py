"""How many layers and neurons stay: given, or found by a budget.

A budget can be met by leaving out no layer and many neurons, one layer and fewer, and so on; each
of these is narrowed, and the one whose embeddings are closest to the original's is taken. Which
layers leave is decided one by one, by what is left of the embeddings without each.

Attention heads stay: these classes compute head_dim as hidden_size / heads, so that a stock config
has no place for fewer heads of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dotexport.encoders.encoder_folder import Encoder, can_hold
from dotexport.encoders.encoder_options import SizeOptions
from dotexport.encoders.encoder_walk import Progress, cut
from dotexport.encoders.sentences import Batch, embed, mean_cosine
from dotexport.errors import SizeError, UsageError
from dotexport.sizes.budget import parse_budget

STEP = 8
"""Widths that a budget leads to are multiples of it."""


@dataclass(frozen=True)
class Sizes:
    """Neurons of every MLP, and how many layers."""

    width: int
    depth: int


def num_parameters(model: nn.Module) -> int:
    """Distinct weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_after(encoder: Encoder, sizes: Sizes) -> int:
    """Of the whole model at these sizes."""
    before, last, kind = before_of(encoder), encoder.layers[-1], encoder.kind
    reader, writer = (last.get_submodule(name) for name in (kind.reader, kind.writer))
    per_neuron = num_parameters(reader) // before.width + int(writer.out_features)  # type: ignore[arg-type]
    whole = num_parameters(encoder.model)
    left_out = (before.depth - sizes.depth) * num_parameters(last)  # the first layer stays
    return whole - left_out - sizes.depth * (before.width - sizes.width) * per_neuron


def before_of(encoder: Encoder) -> Sizes:
    """The original's."""
    writer = encoder.layers[0].get_submodule(encoder.kind.writer)
    return Sizes(int(writer.in_features), len(encoder.layers))  # type: ignore[arg-type]


def candidates(encoder: Encoder, options: SizeOptions, *, total: int) -> list[Sizes]:
    """Sizes that were asked for, or all those at which the budget is used up.

    Args:
        total: parameters of the original, which may have more tokens.

    Raises:
        SizeError: no size meets the budget.
        UsageError: more than there is.
    """
    before = before_of(encoder)
    if options.params is None:
        asked = Sizes(options.width or before.width, options.depth or before.depth)
        if not (1 <= asked.width <= before.width and 1 <= asked.depth <= before.depth):
            raise UsageError(
                f"{asked.width} neurons and {asked.depth} layers cannot stay of {before.width} and "
                f"{before.depth}; give at least 1 and at most that"
            )
        return [asked]
    budget, fixed = _budget(encoder, options, total)
    found = []
    for depth in range(before.depth, 0, -1):
        widths = range(before.width // STEP * STEP, 0, -STEP)
        fitting = (w for w in widths if parameters_after(encoder, Sizes(w, depth)) <= budget)
        if (width := next(fitting, None)) is not None:
            found.append(Sizes(width, depth))
        if width is not None and width >= before.width // STEP * STEP:
            break
    if not found:
        raise SizeError(
            f"{budget:,} parameters cannot be met: embeddings, heads and one layer are "
            f"{parameters_after(encoder, Sizes(STEP, 1)):,} ({fixed:,} of them outside of the "
            "layers); ask for more, count the layers alone with --count layers, or take tokens "
            "with --vocab"
        )
    return found


def _budget(encoder: Encoder, options: SizeOptions, total: int) -> tuple[int, int]:
    """Parameters of the whole model at most, and how many lie outside of the layers."""
    assert options.params is not None
    layers = num_parameters(encoder.layers)
    fixed = num_parameters(encoder.model) - layers
    if options.count == "layers":
        return fixed + parse_budget(options.params, layers), fixed
    return parse_budget(options.params, total), fixed


def choose_layers(
    encoder: Encoder,
    some: Sequence[Batch],
    pooling: str,
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
