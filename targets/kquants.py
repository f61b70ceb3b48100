"""K-quants: superblocks of 256 weights of a row, whose groups have scales that are numbers too.

llama.cpp's formats Q2_K to Q6_K, in the layout that gguf.quants dequantises; that package itself
only reads them. Every group gets the scale (and, in Q2_K, Q4_K and Q5_K, the offset) of the least
squared error among a few candidates, each refined by least squares on its own rounding. Where the
inputs are known, errors count as much as their columns do, and `grid` tells merging/rounding.py the
rest.

Shapes: N superblocks, G groups of each, W weights of a group; J superblocks at once; O rows, I
weights of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from dotexport.merging.rounding import Lattice, Rounded

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.integer[Any]]
Pack = Callable[[NDArray[np.int8], Floats], Bytes]
"""Bytes of superblocks, from levels (J, 256) and what is stored of their groups (J, S)."""

SUPERBLOCK = 256
CHUNK = 8192  # superblocks at a time: 8 MB of float32, and a few times that on the way
# Levels more or fewer than fit between the extremes: a wider step costs the extremes and spares
# the rest.
STRETCHES = np.linspace(-1.0, 1.0, 11, dtype=np.float32)


@dataclass(frozen=True)
class Format:
    """One kind of K-quants, whose weights are step x level - offset.

    Attributes:
        levels: the lowest and the highest.
        fit: what is stored for the groups of superblocks, (J, S), given how much a squared error of
            each of their weights counts (None: all alike).
        lattice: step and offset of each weight, (J, G, 1), from that.
    """

    levels: tuple[int, int]
    fit: Callable[[Floats, Floats | None], Floats]
    lattice: Callable[[Floats], tuple[Floats, Floats]]
    pack: Pack

    def encode(self, blocks_J: Floats) -> Bytes:
        stored_JS = self.fit(blocks_J, None)
        step_JG1, offset_JG1 = self.lattice(stored_JS)
        x_JGW = blocks_J.reshape(*step_JG1.shape[:2], -1)
        q_JGW = _rounded((x_JGW + offset_JG1) * _inverse(step_JG1), *self.levels)
        return self.pack(q_JGW.astype(np.int8).reshape(-1, SUPERBLOCK), stored_JS)


def quantize(weight: NDArray[np.floating], kind: gguf.GGMLQuantizationType) -> Bytes:
    """Rows of bytes, as many as the weight has; the last axis must be whole superblocks.

    Raises:
        ValueError: rows that are no multiple of 256.
    """
    encode = FORMATS[kind].encode
    if weight.shape[-1] % SUPERBLOCK:
        raise ValueError(f"rows of {weight.shape[-1]} are no multiple of {SUPERBLOCK}")
    blocks_N = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, SUPERBLOCK)
    starts = range(0, len(blocks_N), CHUNK)
    packed = np.concatenate([encode(blocks_N[start : start + CHUNK]) for start in starts])
    return packed.reshape(*weight.shape[:-1], -1)


def pack(rounded: Rounded, kind: gguf.GGMLQuantizationType) -> Bytes:
    """Rows of bytes of a matrix whose levels were chosen on its `Grid`."""
    outputs = len(rounded.levels_OI)
    stored_NS = rounded.stored_OGS.flatten(0, 1).numpy()
    levels_N = rounded.levels_OI.numpy().reshape(-1, SUPERBLOCK)
    return FORMATS[kind].pack(levels_N, stored_NS).reshape(outputs, -1)


@dataclass(frozen=True)
class Superblocks:
    """Superblocks as a `Grid` of merging/rounding.py."""

    kind: gguf.GGMLQuantizationType
    width: int = SUPERBLOCK

    @property
    def levels(self) -> tuple[int, int]:
        return FORMATS[self.kind].levels

    def lattices(
        self, weights_OW: torch.Tensor, importance_W: torch.Tensor | None
    ) -> Iterator[Lattice]:
        import torch

        from dotexport.merging.rounding import Lattice

        chosen = FORMATS[self.kind]
        blocks_J = np.ascontiguousarray(weights_OW.cpu().numpy())
        importance = None if importance_W is None else importance_W.cpu().numpy()
        stored_JS = chosen.fit(blocks_J, importance)
        parts = (
            np.broadcast_to(part_JG1, (*part_JG1.shape[:2], SUPERBLOCK // part_JG1.shape[1]))
            for part_JG1 in chosen.lattice(stored_JS)
        )
        found = (torch.from_numpy(part.reshape(-1, SUPERBLOCK)) for part in parts)
        step_OW, offset_OW, stored_OS = (
            part.to(weights_OW.device) for part in (*found, torch.from_numpy(stored_JS))
        )
        yield Lattice(step_OW, offset_OW, stored_OS)


# Scales and offsets: Q2_K, Q4_K, Q5_K ------------------------------------------------------------


def _affine_format(top: int, groups: int, scales: int, pack: Pack) -> Format:
    """Levels from 0 to `top`, and per group a scale and an offset of so many levels: stored are d,
    all scales, dmin, and all offsets of a superblock."""

    def fit(blocks_J: Floats, importance: Floats | None) -> Floats:
        x_JGW = blocks_J.reshape(len(blocks_J), groups, -1)
        scale_JG, offset_JG = _affine(x_JGW, _of_groups(importance, groups), top)
        return np.concatenate([*_shared(scale_JG, scales), *_shared(offset_JG, scales)], axis=1)

    return Format((0, top), fit, _affine_lattice, pack)


def _affine_lattice(stored_JS: Floats) -> tuple[Floats, Floats]:
    d_J1, sc_JG, dmin_J1, m_JG = _affine_parts(stored_JS)
    return (d_J1 * sc_JG)[..., None], (dmin_J1 * m_JG)[..., None]


def _affine_parts(stored_JS: Floats) -> list[Floats]:
    half = stored_JS.shape[1] // 2
    return np.split(stored_JS, (1, half, half + 1), axis=1)


def _pack_2(q_J: NDArray[np.int8], stored_JS: Floats) -> Bytes:
    """Scale and offset of each group in 4 bits: 2.625 bits per weight."""
    d_J1, sc_JG, dmin_J1, m_JG = _affine_parts(stored_JS)
    scales = sc_JG.astype(np.uint8) | m_JG.astype(np.uint8) << 4
    return np.concatenate([scales, _pairs_of_bits(q_J), _half(d_J1), _half(dmin_J1)], axis=1)


def _pack_4(q_J: NDArray[np.int8], stored_JS: Floats) -> Bytes:
    """Scale and offset of each group in 6 bits: 4.5 bits per weight."""
    return np.concatenate([*_six_bit_head(stored_JS), _nibbles(q_J)], axis=1)


def _pack_5(q_J: NDArray[np.int8], stored_JS: Floats) -> Bytes:
    """The same, and the fifth bits of all groups beside each other: 5.5 bits per weight."""
    fifth = _bits(q_J.astype(np.uint8) >> 4)
    return np.concatenate([*_six_bit_head(stored_JS), fifth, _nibbles(q_J & 15)], axis=1)


def _six_bit_head(stored_JS: Floats) -> list[Bytes]:
    d_J1, sc_JG, dmin_J1, m_JG = _affine_parts(stored_JS)
    return [_half(d_J1), _half(dmin_J1), _six_bits(sc_JG, m_JG)]


def _six_bits(sc_JG: Floats, m_JG: Floats) -> Bytes:
    """Eight scales and eight offsets in twelve bytes: the last four of each give their upper two
    bits to the first four."""
    sc, m = sc_JG.astype(np.uint8), m_JG.astype(np.uint8)
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (sc, m)]
    return np.concatenate([*first, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


# Scales alone: Q3_K, Q6_K ------------------------------------------------------------------------


def _symmetric_format(lowest: int, scales: int, pack: Pack) -> Format:
    """Levels from `lowest` to one less than its opposite, and sixteen scales of so many levels of
    either sign: stored are d and all scales of a superblock."""

    def fit(blocks_J: Floats, importance: Floats | None) -> Floats:
        scale_JG = _symmetric(blocks_J.reshape(-1, 16, 16), _of_groups(importance, 16), -lowest)
        return np.concatenate(_shared(scale_JG, scales), axis=1)

    return Format((lowest, -lowest - 1), fit, _symmetric_lattice, pack)


def _symmetric_lattice(stored_JS: Floats) -> tuple[Floats, Floats]:
    step_JG1 = (stored_JS[:, :1] * stored_JS[:, 1:])[..., None]
    return step_JG1, np.zeros_like(step_JG1)


def _pack_3(q_J: NDArray[np.int8], stored_JS: Floats) -> Bytes:
    """Scale of each group in 6 bits, levels' third bits beside each other: 3.4375 bits per
    weight."""
    q_J = (q_J + 4).astype(np.uint8)
    scales = (stored_JS[:, 1:] + 32).astype(np.uint8)
    lower = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    upper = _stacked((scales >> 4).reshape(-1, 4, 4), 2)
    half = _half(stored_JS[:, :1])
    return np.concatenate([_bits(q_J >> 2), _pairs_of_bits(q_J & 3), lower, upper, half], axis=1)


def _pack_6(q_J: NDArray[np.int8], stored_JS: Floats) -> Bytes:
    """Scale of each group in 8 bits: 6.5625 bits per weight."""
    q_J = (q_J + 32).astype(np.uint8)
    lower = _stacked((q_J & 15).reshape(-1, 2, 2, 64), 4).reshape(-1, 128)
    scales = stored_JS[:, 1:].astype(np.int8).view(np.uint8)
    return np.concatenate(
        [lower, _pairs_of_bits(q_J >> 4), scales, _half(stored_JS[:, :1])], axis=1
    )


# Levels in bytes ---------------------------------------------------------------------------------


def _stacked(parts: Integers, bits: int) -> Bytes:
    """Numbers of so few bits along the last axis but one, the first lowest, in one byte."""
    shifts = bits * np.arange(parts.shape[-2], dtype=np.uint8)[:, None]
    found: Bytes = np.bitwise_or.reduce(parts.astype(np.uint8) << shifts, axis=-2)
    return found


def _nibbles(q_J: Integers) -> Bytes:
    return _stacked(q_J.reshape(-1, 4, 2, 32), 4).reshape(-1, 128)


def _pairs_of_bits(q_J: Integers) -> Bytes:
    return _stacked(q_J.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)


def _bits(q_J: Integers) -> Bytes:
    return _stacked(q_J.reshape(-1, 8, 32), 1)


FORMATS: dict[gguf.GGMLQuantizationType, Format] = {
    gguf.GGMLQuantizationType.Q2_K: _affine_format(3, 16, 15, _pack_2),
    gguf.GGMLQuantizationType.Q3_K: _symmetric_format(-4, 31, _pack_3),
    gguf.GGMLQuantizationType.Q4_K: _affine_format(15, 8, 63, _pack_4),
    gguf.GGMLQuantizationType.Q5_K: _affine_format(31, 8, 63, _pack_5),
    gguf.GGMLQuantizationType.Q6_K: _symmetric_format(-32, 127, _pack_6),
}


# Least squares -----------------------------------------------------------------------------------


def _of_groups(importance: Floats | None, groups: int) -> Floats | None:
    """Of each weight of a group, with a mean of 1 in each, (G, W)."""
    if importance is None:
        return None
    importance_GW = importance.reshape(groups, -1).astype(np.float32)
    scaled_GW: Floats = importance_GW / importance_GW.mean(-1, keepdims=True)
    return scaled_GW


def _weighed(x_JGW: Floats, importance_GW: Floats | None) -> Floats:
    return x_JGW if importance_GW is None else x_JGW * importance_GW


def _affine(x_JGW: Floats, importance_GW: Floats | None, top: int) -> tuple[Floats, Floats]:
    """Scale and offset, neither negative, of x ~ scale * q - offset with q in 0..top."""
    low = np.minimum(x_JGW.min(-1, keepdims=True), 0)
    width = x_JGW.max(-1, keepdims=True) - low
    best = np.full(x_JGW.shape[:2], np.inf, dtype=np.float32)
    scale_JG, offset_JG = np.zeros_like(best), np.zeros_like(best)
    for stretch in STRETCHES:
        q = _rounded((x_JGW - low) * (top + stretch) * _inverse(width), 0, top)
        scale, offset = _line(q, x_JGW, importance_GW)
        q = _rounded((x_JGW + offset[..., None]) * _inverse(scale[..., None]), 0, top)
        scale, offset = _line(q, x_JGW, importance_GW)
        gap_JGW = np.square(scale[..., None] * q - offset[..., None] - x_JGW)
        error = _weighed(gap_JGW, importance_GW).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scale_JG = np.where(better, scale, scale_JG)
        offset_JG = np.where(better, offset, offset_JG)
    return scale_JG, offset_JG


def _line(q_JGW: Floats, x_JGW: Floats, importance_GW: Floats | None) -> tuple[Floats, Floats]:
    """Least squares of x on q; through zero where the line would need a negative offset."""
    weighed = _weighed(q_JGW, importance_GW)
    q_mean, x_mean = weighed.mean(-1), _weighed(x_JGW, importance_GW).mean(-1)
    qq, qx = (weighed * q_JGW).mean(-1), (weighed * x_JGW).mean(-1)
    slope = (qx - q_mean * x_mean) * _inverse(qq - q_mean**2)
    offset = slope * q_mean - x_mean
    through_zero = (offset < 0) | (slope <= 0)
    slope = np.where(through_zero, np.maximum(qx * _inverse(qq), 0), slope)
    # All q alike: a constant, and only a negative one has an offset.
    constant = (slope == 0) & (x_mean < 0)
    return slope, np.where(constant, -x_mean, np.where(through_zero, 0, offset))


def _symmetric(x_JGW: Floats, importance_GW: Floats | None, most: int) -> Floats:
    """Scale of x ~ scale * q with q in -most..most - 1; its sign gives the largest weight the level
    -most."""
    at = np.abs(x_JGW).argmax(-1, keepdims=True)
    largest = np.take_along_axis(x_JGW, at, -1)
    best = np.full(x_JGW.shape[:2], -1, dtype=np.float32)
    scale_JG = np.zeros_like(best)
    for stretch in STRETCHES:
        q = _rounded(-x_JGW * (most + stretch) * _inverse(largest), -most, most - 1)
        weighed = _weighed(q, importance_GW)
        qx, qq = (weighed * x_JGW).sum(-1), (weighed * q).sum(-1)
        gain = np.square(qx) * _inverse(qq)  # by how much the squared error falls below that of 0
        scale_JG = np.where(gain > best, qx * _inverse(qq), scale_JG)
        best = np.maximum(best, gain)
    return scale_JG


def _shared(scale_JG: Floats, levels: int) -> tuple[Floats, Floats]:
    """One float16 per superblock and an integer up to `levels` per group, whose products are
    nearest to these scales."""
    exact_J1 = np.abs(scale_JG).max(-1, keepdims=True) / levels
    half_J1 = exact_J1.astype(np.float16)
    # Near 1e-6 float16 has few numbers left: one that is too small would cut off the largest scale
    # by more than rounding to levels costs.
    short_J1 = half_J1 < exact_J1 * (1 - 0.5 / levels)
    d_J1 = np.where(short_J1, np.nextafter(half_J1, np.float16(np.inf)), half_J1).astype(np.float32)
    return d_J1, _rounded(scale_JG * _inverse(d_J1), -levels, levels)


def _rounded(x: Floats, low: int, high: int) -> Floats:
    return np.clip(np.rint(x), low, high)


def _inverse(x: Floats) -> Floats:
    """1 / x, and 0 of 0: what has no width has one level."""
    inverse: Floats = np.divide(1, x, out=np.zeros_like(x), where=x != 0)
    return inverse


def _half(d_J1: Floats) -> Bytes:
    return d_J1.astype("<f2").view(np.uint8)
