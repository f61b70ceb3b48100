"""What a GGUF file says itself, held against the checkpoint that it was written from.

Logits do not tell everything: a rotary size that torch never reads, an epsilon far below the
activations; weights are the matter of stored_rows.py.

Shapes: R rows of a tensor, I entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from .stored_rows import Limits, wrong_rows

Type = gguf.GGMLQuantizationType
ERRORS: dict[Any, Limits] = {
    Type.F32: (1e-6, 1e-6),
    Type.F16: (1e-3, 1e-3),
    Type.Q8_0: (0.02, 2e-3),
    Type.Q6_K: (0.06, 4e-3),
    Type.Q5_K: (0.12, 5e-3),
    Type.Q4_K: (0.25, 7e-3),
    Type.Q3_K: (0.5, 7e-3),
    Type.Q2_K: (0.8, 1.5e-2),
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
        found_RI, limits = (
            gguf.dequantize(tensor.data, tensor.tensor_type),
            ERRORS[tensor.tensor_type],
        )
        if found_RI.shape == true_RI.shape and (
            said := wrong_rows(name, found_RI, true_RI, limits)
        ):
            yield said
