"""Inputs of layers (models/beside.py) of the narrower model: a projection of its own embedding.

Shapes: D width before, K after, X features of all inputs, V vocabulary, B windows of a batch,
L tokens per window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dotexport.merging.refit import fit
from dotexport.models.beside import LayerInputs
from dotexport.models.layers import Stock
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.original import metric
from dotexport.narrowing.streams import Rows, Streams, inverse_rms


def projection_map(
    projection_XD: Tensor, streams: Streams, E_DK: Tensor, options: NarrowOptions
) -> tuple[Tensor, dict[str, Any]]:
    """P of x ~ P y for embeddings x and y of either width, and a report.

    A norm lies behind the projection, so tokens count alike, whatever their size. The class divides
    what is projected by the root of the width, and its epsilon grows as it shrinks: for a y that
    says all of x, both give the same.

    Args:
        streams: in front of the first layer.
    """
    if not options.refit:
        return E_DK, {}

    def read(rows: Rows) -> tuple[Tensor, Tensor]:
        x_BLD = streams.original(rows)
        weight_BL1 = inverse_rms(x_BLD)
        return streams.narrowed(rows) * weight_BL1, x_BLD * weight_BL1

    train, held = streams.moments(read, metric_OO=metric(projection_XD))
    fitted = streams.processes.agreed(lambda: fit(train, held, E_DK, ridge=options.ridge))
    return fitted.weights_OI, fitted.as_dict()


def narrowed_inputs(
    theirs: LayerInputs, embedding_VK: Tensor, projection_XK: Tensor, stock: Stock
) -> LayerInputs:
    """As the narrower class makes them, of the tokens that the original's are made of.

    Args:
        embedding_VK: what enters the narrower stream.
    """
    weight: Any = theirs.norm.weight
    return replace(
        theirs,
        embedded_UD=embedding_VK[theirs.occurring_U].float(),
        projection_XD=projection_XK.float(),
        norm=stock.norm_with(weight.to(torch.float32)),
    )
