"""What an ONNX graph has in itself."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def constant(graph: Any, name: str, array: NDArray[Any]) -> Any:
    """A value that is stored in the graph."""
    stored = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=stored, shape=ir.Shape(array.shape))
    value.dtype = stored.dtype
    graph.register_initializer(value)
    return value
