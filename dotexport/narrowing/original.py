"""The original model, one piece at a time, with every norm that has readers folded into them.

Shapes: D hidden_size, V vocabulary, B windows of a batch, L tokens per window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dotexport.merging.gram import gram
from dotexport.models.beside import LayerInputs
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.family import Family
from dotexport.models.layers import Layer, Stock, layer_tensors
from dotexport.models.shapes import Sizes, shapes
from dotexport.narrowing.streams import Streams

ROWS = 16384  # of a vocabulary in float64 at once: as a whole it does not fit twice


@dataclass(frozen=True)
class Original:
    """Tensors of the source in float32 on the device, read when asked for."""

    source: Checkpoint
    family: Family
    sizes: Sizes
    stock: Stock
    device: torch.device

    def read(self, name: str) -> Tensor:
        return self.source.tensor(name).to(self.device).float()

    def table(self) -> Tensor:
        """The embedding as stored, (V, D)."""
        return self.read(f"{self.family.embedding}.weight")

    def embedding(self) -> Tensor:
        """What enters the stream, (V, D)."""
        scale = self.family.embedding_scale(self.sizes.hidden_size)
        return self.table() if scale == 1.0 else self.table() * scale

    def gamma(self) -> Tensor:
        """The final norm's (D,)."""
        return self.read(f"{self.family.final_norm}.weight") + float(self.family.unit_offset)

    def head(self) -> Tensor:
        """lm_head as stored, (V, D); the embedding's table where they are one."""
        return self.table() if self.sizes.tied else self.read(f"{self.family.head.name}.weight")

    def folded_head(self) -> Tensor:
        """lm_head with the final norm's gamma folded in, (V, D)."""
        return self.head() * self.gamma()

    def layer(self, number: int) -> Layer:
        """A decoder layer whose norms before readers have a gamma of ones, folded into them."""
        tensors = layer_tensors(self.family, number, self.read, self._names)
        offset = float(self.family.unit_offset)
        for sublayer in self.family.in_layer(self.sizes.kind(number)):
            if sublayer.norm is None:
                continue
            gamma = f"{sublayer.norm}.weight"
            for linear in sublayer.all_readers:
                for name in linear.names(self.sizes.num_experts):
                    tensors[f"{name}.weight"] *= tensors[gamma] + offset
            tensors[gamma] = torch.ones_like(tensors[gamma]) - offset
        return Layer(self.stock, self.family, number, tensors)

    def enter(self, embedding_VD: Tensor, streams: Streams) -> None:
        """Start the original's stream over a text, with what lies beside it."""
        embed(embedding_VD, streams, streams.original_NLD)
        beside = streams.beside_original
        beside.inputs = self.inputs(embedding_VD, beside.tokens_NL)

    def inputs(self, embedding_VD: Tensor, tokens_NL: Tensor) -> LayerInputs | None:
        """What layers are given besides the stream, of the tokens of a text."""
        if (given := self.family.per_layer) is None:
            return None
        table, norm = given.unchanged
        occurring_U = tokens_NL.unique()
        return LayerInputs(
            occurring_U.to(self.device),
            embedding_VD[occurring_U.to(embedding_VD.device)],
            self.source.tensor(table)[occurring_U.cpu()].to(self.device),
            self.read(f"{given.projection.name}.weight"),
            self.stock.norm_with(self.read(norm)),
            self.sizes.spaces[given.features],
        )

    @property
    def _names(self) -> Mapping[str, Any]:
        return dict(shapes(self.family, self.sizes))


def embed(table_VX: Tensor, streams: Streams, stream_NLX: Tensor) -> None:
    """Fill a stream with the rows of its tokens."""
    for rows in streams.batches():
        tokens_BL = streams.tokens(rows).to(table_VX.device)
        stream_NLX[rows] = table_VX[tokens_BL].to(stream_NLX.device)


def metric(weights_OI: Tensor) -> Tensor:
    """W^T W in float64, a block of rows at a time."""
    size = weights_OI.shape[1]
    total_II = torch.zeros(size, size, dtype=torch.float64, device=weights_OI.device)
    for block_OI in torch.split(weights_OI, ROWS):
        total_II += gram(block_OI.double())
    return total_II
