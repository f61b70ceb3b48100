"""Formats of GGUF as grids that weights are rounded on, and the bytes of levels that were chosen.

Shapes: O outputs, I inputs, K blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dotexport.merging.rounding import FIVE_BITS, FOUR_BITS, Blocks, Grid, Rounded

from . import kquants
from .ggml_mixes import BLOCK

Type = gguf.GGMLQuantizationType
GRIDS: dict[Type, Grid] = {
    Type.Q8_0: Blocks(BLOCK, (-127, 127), torch.float16),
    Type.Q5_0: Blocks(BLOCK, (-16, 15), torch.float16, FIVE_BITS),
    Type.Q4_0: Blocks(BLOCK, (-8, 7), torch.float16, FOUR_BITS),
    **{kind: kquants.Superblocks(kind) for kind in kquants.FORMATS},
}


def pack(rounded: Rounded, kind: Type) -> NDArray[np.uint8]:
    """Rows of bytes."""
    if kind in kquants.FORMATS:
        return kquants.pack(rounded, kind)
    outputs = len(rounded.levels_OI)
    levels = rounded.levels_OI.numpy().reshape(outputs, -1, BLOCK)
    scales = rounded.stored_OGS.numpy().astype("<f2").view(np.uint8)
    packed = PACK[kind](levels).view(np.uint8)
    return np.concatenate([scales, packed], axis=-1).reshape(outputs, -1)


def _nibbles(levels_K: NDArray[Any]) -> NDArray[Any]:
    """The second half of a block in the upper halves of its bytes."""
    packed_K: NDArray[Any] = levels_K[..., : BLOCK // 2] | levels_K[..., BLOCK // 2 :] << 4
    return packed_K


def _five_bits(levels_K: NDArray[np.int8]) -> NDArray[Any]:
    """The fifth bits of a block in front of its nibbles."""
    found_K = (levels_K + 16).astype(np.uint8)
    fifth_K = np.packbits(found_K >> 4, axis=-1, bitorder="little")
    return np.concatenate([fifth_K, _nibbles(found_K & np.uint8(15))], axis=-1)


PACK: dict[Type, Callable[[NDArray[np.int8]], NDArray[Any]]] = {
    Type.Q8_0: lambda levels: levels,
    Type.Q5_0: _five_bits,
    Type.Q4_0: lambda levels: _nibbles((levels + 8).astype(np.uint8)),
}
