"""Formats of GGUF as grids that weights are rounded on, and the bytes of levels that were chosen.

Shapes: O outputs, I inputs, K blocks of a row.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dotexport.merging.rounding import FOUR_BITS, Blocks, Grid, Rounded

from . import kquants

Type = gguf.GGMLQuantizationType
BLOCK = 32  # weights of a row that share one scale, in Q8_0 and Q4_0
GRIDS: dict[Type, Grid] = {
    Type.Q8_0: Blocks(BLOCK, (-127, 127), torch.float16),
    Type.Q4_0: Blocks(BLOCK, (-8, 7), torch.float16, FOUR_BITS),
    **{kind: kquants.Superblocks(kind) for kind in kquants.FORMATS},
}


def pack(rounded: Rounded, kind: Type) -> NDArray[np.uint8]:
    """Rows of bytes."""
    if kind in kquants.FORMATS:
        return kquants.pack(rounded, kind)
    outputs = len(rounded.levels_OI)
    levels = rounded.levels_OI.numpy().reshape(outputs, -1, BLOCK)
    if kind == Type.Q4_0:  # the second half of a block in the upper halves of its bytes
        nibbles = (levels + 8).astype(np.uint8)
        levels = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    scales = rounded.stored_OGS.numpy().astype("<f2").view(np.uint8)
    return np.concatenate([scales, levels.view(np.uint8)], axis=-1).reshape(outputs, -1)
