"""Which of llama.cpp's types a tensor is stored in: by the precision, and in mixes of K-quants by
what the tensor is and where, as llama.cpp's own Q4_K_M, Q3_K_M and Q2_K have it (its
src/llama-quant.cpp; exceptions for single models aside)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf

from .kquants import SUPERBLOCK

Type = gguf.GGMLQuantizationType
BLOCK = 32  # weights of a row that share one scale, in Q8_0, Q5_0 and Q4_0
MATRICES = {
    "fp16": Type.F16,
    "int8": Type.Q8_0,
    "int4": Type.Q4_0,
    "int6-k": Type.Q6_K,
    "int4-k": Type.Q4_K,
    "int3-k": Type.Q3_K,
    "int2-k": Type.Q2_K,
}
FILE_TYPES = {
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
    "int6-k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "int4-k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "int3-k": gguf.LlamaFileType.MOSTLY_Q3_K_M,
    "int2-k": gguf.LlamaFileType.MOSTLY_Q2_K,
}
IN_BLOCKS = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_0,
    Type.Q6_K: Type.Q8_0,
}
"""What stands in for K-quants where rows are no whole superblocks. llama.cpp's quantiser has IQ4_NL
for the first two, as large as Q4_0, and Q5_1 for Q5_K."""


@dataclass(frozen=True)
class Depth:
    """Where a matrix is.

    Attributes:
        layer, layers: its number, and how many there are.
        shared: query heads to a KV head.
    """

    layer: int
    layers: int
    shared: int

    @property
    def counts_more(self) -> bool:
        """The first eighth of the layers, the last, and every third."""
        eighth = self.layers // 8
        last = self.layer >= 7 * self.layers // 8
        return self.layer < eighth or last or (self.layer - eighth) % 3 == 2


Rule = Callable[[Depth], Any]


def _more(at: Depth) -> Any:
    return Type.Q6_K if at.counts_more else Type.Q4_K


MIXES: dict[str, dict[str, Rule]] = {
    "int4-k": {"attn_v": _more, "ffn_down": _more},
    "int3-k": {
        "attn_v": lambda at: Type.Q5_K if at.layer < 2 else Type.Q4_K,
        "ffn_down": lambda at: Type.Q5_K if at.layer < at.layers // 16 else Type.Q4_K,
        "attn_output": lambda at: Type.Q4_K,
    },
    "int2-k": {
        "attn_v": lambda at: Type.Q4_K if at.shared >= 4 else Type.Q3_K,
        "ffn_down": lambda at: Type.Q3_K,
        "attn_output": lambda at: Type.Q3_K,
    },
}
"""Precision -> matrix -> its type; all other matrices have that of MATRICES, heads Q6_K."""


def stored_as(
    name: str, shape: tuple[int, ...], precision: str, *, layers: int, shared: int, tied: bool
) -> Any:
    """How llama.cpp's name of a tensor is stored.

    Args:
        shared: query heads to a KV head.
    """
    if len(shape) == 1:
        return Type.F32
    if precision == "fp16" or shape[-1] % BLOCK:
        return Type.F16
    kind = _intended(name, precision, layers=layers, shared=shared, tied=tied)
    return IN_BLOCKS.get(kind, kind) if shape[-1] % SUPERBLOCK else kind


def _intended(name: str, precision: str, *, layers: int, shared: int, tied: bool) -> Any:
    """Whatever its rows."""
    if precision == "int4" and name.startswith("token_embd"):
        return Type.Q8_0
    if mix := MIXES.get(precision):
        if name.startswith("token_embd" if tied else "output."):
            return Type.Q6_K
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if found and (rule := mix.get(found[2])):
            return rule(Depth(int(found[1]), layers, shared))
    return MATRICES[precision]
