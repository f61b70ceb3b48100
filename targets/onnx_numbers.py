"""The epsilons of an ONNX graph, held against config.json.

They are far below what a norm divides by, so logits hardly move with them until activations are
small: a graph can be read where it cannot be heard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx


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
