"""Numbers of an ONNX graph, held against config.json: epsilons, and tables of rotary angles.

Epsilons are far below what a norm divides by, so logits hardly move with them until activations are
small; and the end of a table is only heard by prompts that take hours. Both can be read.

Shapes: T positions of the context, F frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

TABLES = {"cos_cache": np.cos, "sin_cache": np.sin}
HALVES = {onnx.TensorProto.FLOAT16: 2.0**-10, onnx.TensorProto.BFLOAT16: 2.0**-7}
NUM_POSITIONS = 256


def wrong_epsilons(file: Path, config: Mapping[str, Any]) -> list[str]:
    """Norms whose epsilon is not that of config.json: as an attribute, or as the constant that is
    added to a mean square."""
    wanted = float(config.get("rms_norm_eps", 1e-6))
    graph = onnx.load(file, load_external_data=False).graph
    wrong = {
        name: found
        for name, found in (*_attributes(graph), *_added(graph))
        if not math.isclose(found, wanted, rel_tol=1e-3)  # in float16 subnormals are coarse
    }
    if not wrong:
        return []
    name, found = next(iter(wrong.items()))
    return [
        f"{len(wrong)} norms of the graph have another epsilon than config.json's {wanted:.6g} "
        f"({name}: {found:.6g})"
    ]


def _attributes(graph: Any) -> Iterator[tuple[str, float]]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                yield node.name, attribute.f


def _added(graph: Any) -> Iterator[tuple[str, float]]:
    scalars = {t.name: value for t in graph.initializer if (value := _scalar(t)) is not None}
    for node in graph.node:
        if node.op_type == "Constant" and (value := _scalar(node.attribute[0].t)) is not None:
            scalars[node.output[0]] = value
    means = {name for node in graph.node if node.op_type == "ReduceMean" for name in node.output}
    for node in graph.node:
        if node.op_type == "Add" and means.intersection(node.input):
            for name in set(node.input) & set(scalars):
                yield node.name, scalars[name]


def _scalar(tensor: Any) -> float | None:
    if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) != 1:
        return None
    return float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])


def wrong_tables(
    file: Path, frequencies_F: NDArray[np.float64], gain: float, context: int
) -> list[str]:
    """Rotary tables that say other angles than position times frequency, at positions throughout
    the context; a graph without tables has none.

    Args:
        gain: what rotated heads are multiplied with.
    """
    graph = onnx.load(file, load_external_data=False).graph
    problems = []
    for tensor in graph.initializer:
        if tensor.name not in TABLES:
            continue
        table_TF = _read(tensor, file.parent)
        if table_TF.shape != (context, len(frequencies_F)):
            problems.append(
                f"{tensor.name} is {table_TF.shape}, and the context has {context} positions of "
                f"{len(frequencies_F)} frequencies"
            )
            continue
        at_N = np.unique(np.linspace(0, context - 1, NUM_POSITIONS).round().astype(int))
        wanted_NF = gain * TABLES[tensor.name](at_N[:, None] * frequencies_F)
        gap_N = np.abs(table_TF[at_N] - wanted_NF).max(-1)
        # Angles in float32 are as coarse as they are large.
        allowed_N = gain * (1e-5 + at_N * 2.0**-22 + HALVES.get(tensor.data_type, 0.0))
        if (gap_N > allowed_N).any():
            worst = int(at_N[(gap_N - allowed_N).argmax()])
            problems.append(
                f"{tensor.name} is {gap_N.max():.2g} off at position {worst} of {context}"
            )
    return problems


def _read(tensor: Any, folder: Path) -> NDArray[np.float64]:
    values: NDArray[Any] = onnx.numpy_helper.to_array(tensor, str(folder))
    return values.astype(np.float64)
