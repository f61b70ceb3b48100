"""What a GGUF file says itself, held against the checkpoint that it was written from.

Logits do not tell everything: a rotary size that torch never reads, an epsilon far below the
activations, scales of 4-bit blocks that are all off by one percent.

Shapes: R rows of a tensor, I entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Type = gguf.GGMLQuantizationType
# Largest relative error of a row, and largest deviation from 1 of what a tensor is multiplied with.
ERRORS: dict[Any, tuple[float, float]] = {
    Type.F32: (1e-6, 1e-6),
    Type.F16: (1e-3, 1e-3),
    Type.Q8_0: (0.02, 2e-3),
    Type.Q6_K: (0.06, 4e-3),
    Type.Q4_K: (0.25, 7e-3),
    Type.Q4_0: (0.25, 7e-3),
}
IGNORED = {"general.name", "general.architecture"}


def wrong_in_file(
    file: Path, told: Mapping[str, Any], tensors: Iterable[tuple[str, NDArray[Any]]]
) -> list[str]:
    """Every number of the header and every tensor that is not what it should be.

    Args:
        told: key of the header -> what it should say.
        tensors: name in the file and values, one after another.
    """
    reader = gguf.GGUFReader(file)
    return [*_header(reader, told), *_weights(reader, tensors)]


def _header(reader: Any, told: Mapping[str, Any]) -> Iterator[str]:
    for name, value in told.items():
        found = reader.fields[name].contents() if name in reader.fields else None
        if isinstance(value, float) and isinstance(found, float):
            same = math.isclose(found, value, rel_tol=1e-6)  # stored in float32
        else:
            same = found == value
        if name not in IGNORED and not same:
            yield f"the header says {name} = {found!r}, and config.json means {value!r}"


def _weights(reader: Any, tensors: Iterable[tuple[str, NDArray[Any]]]) -> Iterator[str]:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, true_RI in tensors:
        tensor = stored.get(name)
        if tensor is None or tensor.tensor_type not in ERRORS:
            continue  # reading it as a model says what is missing
        found_RI = gguf.dequantize(tensor.data, tensor.tensor_type)
        if found_RI.shape != true_RI.shape:
            continue
        error, scale = _errors(np.atleast_2d(found_RI), np.atleast_2d(true_RI))
        most, off = ERRORS[tensor.tensor_type]
        if not error <= most:
            yield f"a row of {name} is {error:.2g} off the checkpoint's, more than {most:.2g}"
        elif not abs(scale - 1) <= off:
            yield f"{name} is {scale:.4f} times the checkpoint's; rounding explains {off:.2g}"


def _errors(found_RI: NDArray[Any], true_RI: NDArray[Any]) -> tuple[float, float]:
    """The worst row's relative error, and the factor between the tensors by least squares."""
    size_R = np.linalg.norm(true_RI, axis=-1)
    typical = float(np.sqrt(np.square(size_R).mean()))
    gap_R = np.linalg.norm(found_RI - true_RI, axis=-1)
    # Rows of hardly anything are rounded with their neighbours' sizes in mind.
    error = float((gap_R / np.maximum(size_R, max(1e-2 * typical, 1e-30))).max())
    energy = float(np.square(true_RI).sum())
    return error, float((found_RI * true_RI).sum()) / energy if energy else 1.0
