"""K-quants: superblocks of 256 weights of a row, whose groups have scales that are numbers too.

llama.cpp's formats Q4_K and Q6_K, in the layout that gguf.quants dequantises; that package itself
only reads them. Every group gets the scale (and, in Q4_K, the offset) of the least squared error
among a few candidates, each refined by least squares on its own rounding.

Shapes: N superblocks, G groups of each, W weights of a group; J superblocks at once.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPERBLOCK = 256
CHUNK = 8192  # superblocks at a time: 8 MB of float32, and a few times that on the way
# Levels more or fewer than fit between the extremes: a wider step costs the extremes and spares
# the rest.
STRETCHES = np.linspace(-1.0, 1.0, 11, dtype=np.float32)


def quantize(weight: NDArray[np.floating], kind: gguf.GGMLQuantizationType) -> Bytes:
    """Rows of bytes, as many as the weight has; the last axis must be whole superblocks.

    Raises:
        ValueError: rows that are no multiple of 256.
    """
    encode = ENCODERS[kind]
    if weight.shape[-1] % SUPERBLOCK:
        raise ValueError(f"rows of {weight.shape[-1]} are no multiple of {SUPERBLOCK}")
    blocks_N = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, SUPERBLOCK)
    starts = range(0, len(blocks_N), CHUNK)
    packed = np.concatenate([encode(blocks_N[start : start + CHUNK]) for start in starts])
    return packed.reshape(*weight.shape[:-1], -1)


def _q4_k(blocks_J: Floats) -> Bytes:
    """Groups of 32 in 16 levels, scale and offset of each in 6 bits: 4.5 bits per weight."""
    x_JGW = blocks_J.reshape(-1, 8, 32)
    scale_JG, offset_JG = _affine(x_JGW)
    d_J1, sc_JG = _shared(scale_JG, 63)
    dmin_J1, m_JG = _shared(offset_JG, 63)
    step_JGW, low_JGW = (d_J1 * sc_JG)[..., None], (dmin_J1 * m_JG)[..., None]
    q_JGW = _rounded((x_JGW + low_JGW) * _inverse(step_JGW), 0, 15).astype(np.uint8)
    pairs = q_JGW.reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return np.concatenate(
        [_half(d_J1), _half(dmin_J1), _six_bits(sc_JG, m_JG), nibbles.reshape(-1, 128)], axis=1
    )


def _six_bits(sc_JG: Floats, m_JG: Floats) -> Bytes:
    """Eight scales and eight offsets in twelve bytes: the last four of each give their upper two
    bits to the first four."""
    sc, m = sc_JG.astype(np.uint8), m_JG.astype(np.uint8)
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (sc, m)]
    return np.concatenate([*first, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


def _q6_k(blocks_J: Floats) -> Bytes:
    """Groups of 16 in 64 levels around zero, scale of each in 8 bits: 6.5625 bits per weight."""
    x_JGW = blocks_J.reshape(-1, 16, 16)
    d_J1, sc_JG = _shared(_symmetric(x_JGW), 127)
    steps = _inverse((d_J1 * sc_JG)[..., None])
    q_J = (_rounded(x_JGW * steps, -32, 31) + 32).astype(np.uint8).reshape(-1, SUPERBLOCK)
    lower = (q_J & 15).reshape(-1, 2, 2, 64)
    upper = (q_J >> 4).reshape(-1, 2, 4, 32)
    ql = lower[:, :, 0] | lower[:, :, 1] << 4
    qh = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
    scales = sc_JG.astype(np.int8).view(np.uint8)
    return np.concatenate([ql.reshape(-1, 128), qh.reshape(-1, 64), scales, _half(d_J1)], axis=1)


ENCODERS: dict[gguf.GGMLQuantizationType, Callable[[Floats], Bytes]] = {
    gguf.GGMLQuantizationType.Q4_K: _q4_k,
    gguf.GGMLQuantizationType.Q6_K: _q6_k,
}


def _affine(x_JGW: Floats) -> tuple[Floats, Floats]:
    """Scale and offset, neither negative, of x ~ scale * q - offset with q in 0..15."""
    low = np.minimum(x_JGW.min(-1, keepdims=True), 0)
    width = x_JGW.max(-1, keepdims=True) - low
    best = np.full(x_JGW.shape[:2], np.inf, dtype=np.float32)
    scale_JG, offset_JG = np.zeros_like(best), np.zeros_like(best)
    for stretch in STRETCHES:
        q = _rounded((x_JGW - low) * (15 + stretch) * _inverse(width), 0, 15)
        scale, offset = _line(q, x_JGW)
        q = _rounded((x_JGW + offset[..., None]) * _inverse(scale[..., None]), 0, 15)
        scale, offset = _line(q, x_JGW)
        error = np.square(scale[..., None] * q - offset[..., None] - x_JGW).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scale_JG = np.where(better, scale, scale_JG)
        offset_JG = np.where(better, offset, offset_JG)
    return scale_JG, offset_JG


def _line(q_JGW: Floats, x_JGW: Floats) -> tuple[Floats, Floats]:
    """Least squares of x on q; through zero where the line would need a negative offset."""
    q_mean, x_mean = q_JGW.mean(-1), x_JGW.mean(-1)
    qq, qx = np.square(q_JGW).mean(-1), (q_JGW * x_JGW).mean(-1)
    slope = (qx - q_mean * x_mean) * _inverse(qq - q_mean**2)
    offset = slope * q_mean - x_mean
    through_zero = (offset < 0) | (slope <= 0)
    slope = np.where(through_zero, np.maximum(qx * _inverse(qq), 0), slope)
    # All q alike: a constant, and only a negative one has an offset.
    constant = (slope == 0) & (x_mean < 0)
    return slope, np.where(constant, -x_mean, np.where(through_zero, 0, offset))


def _symmetric(x_JGW: Floats) -> Floats:
    """Scale of x ~ scale * q with q in -32..31; its sign gives the largest weight the level -32."""
    at = np.abs(x_JGW).argmax(-1, keepdims=True)
    largest = np.take_along_axis(x_JGW, at, -1)
    best = np.full(x_JGW.shape[:2], -1, dtype=np.float32)
    scale_JG = np.zeros_like(best)
    for stretch in STRETCHES:
        q = _rounded(-x_JGW * (32 + stretch) * _inverse(largest), -32, 31)
        qx, qq = (q * x_JGW).sum(-1), np.square(q).sum(-1)
        gain = np.square(qx) * _inverse(qq)  # by how much the squared error falls below that of 0
        scale_JG = np.where(gain > best, qx * _inverse(qq), scale_JG)
        best = np.maximum(best, gain)
    return scale_JG


def _shared(scale_JG: Floats, levels: int) -> tuple[Floats, Floats]:
    """One float16 per superblock and an integer up to `levels` per group, whose products are
    nearest to these scales."""
    exact_J1 = np.abs(scale_JG).max(-1, keepdims=True) / levels
    half_J1 = exact_J1.astype(np.float16)
    # Upwards, or the largest scale would be cut off: near 1e-6 float16 has few numbers left. What
    # is a rounding of float32 below stays.
    short_J1 = half_J1 < exact_J1 * (1 - 2.0**-20)
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
