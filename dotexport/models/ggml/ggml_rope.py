"""The rotary embedding of a GGUF file in the words of config.json.

Shapes: F frequencies of a head, the fastest first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import UnsupportedModelError

if TYPE_CHECKING:
    from dotexport.models.ggml.ggml_file import GgufFile

Array = NDArray[np.float64]

FACTORS = "rope_freqs.weight"
CLOSE = 1e-5  # relative; factors are stored in float32
LOW, HIGH = 1.0, 4.0  # Llama 3's own; the others follow from what is stored
ORIGINALS = [1 << power for power in range(4, 18)]


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies rotated heads with; transformers' default as well."""
    return 0.1 * math.log(factor) + 1


def read_rope(file: GgufFile, width: int) -> dict[str, Any]:
    """`rope_parameters` of heads of `width`, all of which turns.

    Raises:
        UnsupportedModelError: frequencies that no class of transformers computes from numbers, or
            heads that turn in part.
    """
    turned = file.setting("rope.dimension_count", width)
    if turned != width:
        raise UnsupportedModelError(
            f"{file.path} turns {turned} of the {width} features of a head; dotexport reads "
            "models whose heads turn as a whole"
        )
    base = {"rope_theta": float(file.setting("rope.freq_base", 10000.0))}
    if FACTORS in file.tensors:
        return base | _llama3(file, base["rope_theta"], width)
    older = float(file.setting("rope.scale_linear", 0.0))  # the word for it until 2023
    kind = file.setting("rope.scaling.type", "linear" if older else "none")
    factor = float(file.setting("rope.scaling.factor", older))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return base | _yarn(file, factor)
    raise UnsupportedModelError(
        f"{file.path} scales its rotary embedding by {kind!r}; expected none, linear, yarn, or the "
        "factors of Llama 3"
    )


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.setting("rope.scaling.original_context_length"),
    }
    for said, key in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := file.setting(f"rope.scaling.{said}", 0.0)) > 0:
            rope[key] = value
    own = float(file.setting("rope.scaling.attn_factor", 1.0))
    if own != 1.0:
        rope["attention_factor"] = own * yarn_attention(factor)
    return rope


def _llama3(file: GgufFile, theta: float, width: int) -> dict[str, Any]:
    """The numbers that the stored factors follow from.

    Transformers' reader passes over the factors, and has another model than llama.cpp.
    """
    stored_F = file.tensor(FACTORS).double().numpy()
    if stored_F.shape == (width // 2,):
        waves_F = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
        if np.allclose(stored_F, 1.0, rtol=CLOSE):
            return {"rope_type": "default"}
        factor = _round(stored_F.max())
        found = [(LOW, HIGH, original) for original in ORIGINALS]
        for low, high, original in [*found, *_solved(stored_F, waves_F, factor)]:
            if np.allclose(
                llama3_factors(waves_F, factor, low, high, original), stored_F, rtol=CLOSE
            ):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise UnsupportedModelError(
        f"{file.path} holds factors for its rotary embedding ({FACTORS}) that are not Llama 3's; "
        "take the model that the file was made from"
    )


def llama3_factors(
    waves_F: Array, factor: float, low: float, high: float, original: float
) -> Array:
    """What frequencies of these wavelengths, in positions, are divided by.

    Transformers' `_compute_llama3_parameters`: short waves stay, long ones are stretched by
    `factor`, and in between the two are mixed by `s = (original / wave - low) / (high - low)`.
    """
    mixed_F = np.clip((original / waves_F - low) / (high - low), 0, 1)
    factors_F: Array = 1 / ((1 - mixed_F) / factor + mixed_F)
    return factors_F


def _solved(stored_F: Array, waves_F: Array, factor: float) -> list[tuple[float, float, int]]:
    """low = 1 and what then follows, by least squares over the frequencies that are mixed."""
    if factor <= 1:
        return []
    mixed_F = (1 / stored_F - 1 / factor) / (1 - 1 / factor)
    inside = (mixed_F > CLOSE) & (mixed_F < 1 - CLOSE)
    if inside.sum() < 2:
        return []
    # s = a / wave - b, with a = original / (high - low) and b = low / (high - low)
    sides = np.stack([1 / waves_F[inside], -np.ones(inside.sum())], axis=1)
    a, b = np.linalg.lstsq(sides, mixed_F[inside], rcond=None)[0]
    return [(LOW, _round(LOW + LOW / b), round(a * LOW / b))] if b > 0 else []


def _round(value: float) -> float:
    """To five digits: what was written down by hand and came through float32."""
    return float(f"{value:.5g}")
