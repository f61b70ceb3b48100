"""Weights of an ONNX graph in blocks of 32 inputs with one scale each, as MatMulNBits of ONNX
Runtime and its builds for browsers multiplies with: layers in 4 bits, the head and tables in 8.

A tied table is stored once. Tokens are looked up in the bytes that the head multiplies with. Scales
are of the dtype that the graph computes in, float32 or float16.

Shapes: O, I outputs and inputs of a matrix, K blocks of inputs, S bytes of a block; V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dotexport.exports.target import QUANTISED_BLOCK
from dotexport.merging.rounding import FOUR_BITS, Blocks, Rounded, nearest

from .onnx_values import constant

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

Array = NDArray[Any]
DOMAIN = "com.microsoft"
LAYERS, TABLES = 4, 8
GRIDS = {
    LAYERS: Blocks(QUANTISED_BLOCK, (-8, 7), shares=FOUR_BITS),
    TABLES: Blocks(QUANTISED_BLOCK, (-128, 127)),
}
LEVELS, SCALES = "_levels", "_scales"
TINY = 1e-6  # of the largest weight: products in float32


@dataclass(frozen=True)
class Stored:
    """A matrix in the graph.

    Attributes:
        level: bytes (O, K, S); scale: (O, K).
        inputs: I, which may end within the last block.
    """

    level: Any
    scale: Any
    bits: int
    inputs: int


def grid_of(bits: int, *, half: bool) -> Blocks:
    """Args: half: scales are float16."""
    return replace(GRIDS[bits], scale=torch.float16) if half else GRIDS[bits]


def grids(checkpoint: Checkpoint, *, half: bool) -> dict[str, Blocks]:
    """The matrices of all layers, by the checkpoint's names."""
    rows = checkpoint.config["vocab_size"]
    specs = checkpoint.specs.items()
    return {
        name: grid_of(LAYERS, half=half)
        for name, spec in specs
        if len(spec.shape) == 2 and spec.shape[0] != rows
    }


def round_in_blocks(
    model: Any, checkpoint: Checkpoint, rounded: Mapping[str, Rounded], *, half: bool
) -> None:
    """Let products with stored matrices, and look-ups in stored tables, read blocks.

    Args:
        rounded: levels that were chosen; other matrices are rounded to nearest.
        half: the graph computes in float16.
    """
    made = _Making(model.graph, checkpoint, rounded, half=half)
    for node in list(model.graph):
        if node.op_type == "MatMul":
            made.product(node)
        elif node.op_type == "Gather":
            made.look_up(node)
    made.forget()
    model.opset_imports[DOMAIN] = 1


def values(checkpoint: Checkpoint, graph: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What the matrices and tables of a written graph are, float32, by the checkpoint's names."""
    constants = graph.initializers
    for name, spec in checkpoint.specs.items():
        if f"{name}{LEVELS}" not in constants:
            continue
        byte_OKS = constants[f"{name}{LEVELS}"].const_value.numpy()
        bits = TABLES if byte_OKS.shape[-1] == QUANTISED_BLOCK else LAYERS
        if bits == LAYERS:
            byte_OKS = np.stack([byte_OKS & 15, byte_OKS >> 4], axis=-1)
        level_OKW = byte_OKS.reshape(*byte_OKS.shape[:2], -1).astype(np.float32)
        scale_OK = constants[f"{name}{SCALES}"].const_value.numpy().astype(np.float32)
        value_OI = ((level_OKW - (1 << bits - 1)) * scale_OK[..., None]).reshape(len(scale_OK), -1)
        yield name, torch.from_numpy(value_OI[:, : spec.shape[-1]].copy())


def not_nearest(checkpoint: Checkpoint, graph: Any, chosen: Collection[str]) -> list[str]:
    """Matrices of a written graph that are other than the checkpoint's, rounded to nearest.

    Args:
        chosen: names of those that were rounded for a text.
    """
    found = dict(values(checkpoint, graph))
    missing = grids(checkpoint, half=False).keys() - found.keys()
    problems = [f"{name} is not in the graph" for name in sorted(missing)]
    for name, value_OI in found.items():
        if name in chosen:
            continue
        weights_OI = checkpoint.tensor(name)
        bits = TABLES if len(weights_OI) == checkpoint.config["vocab_size"] else LAYERS
        half = graph.initializers[f"{name}{SCALES}"].dtype == ir.DataType.FLOAT16
        gap_OI = (value_OI - nearest(weights_OI, grid_of(bits, half=half))[1]).abs()
        if not gap_OI.max() <= TINY * weights_OI.abs().max():
            problems.append(f"{name} is not the checkpoint's rounded to the nearest level")
    return problems


def packed(rounded: Rounded, bits: int = LAYERS) -> tuple[Array, Array]:
    """Bytes (O, K S), of 4 bits two in each and the first in the low half, and scales (O, K)."""
    level_OI = rounded.levels_OI.numpy().astype(np.int16)
    filled = (0, -level_OI.shape[1] % QUANTISED_BLOCK)
    byte_OI = (np.pad(level_OI, ((0, 0), filled)) + (1 << bits - 1)).astype(np.uint8)
    scale_OK = rounded.stored_OGS[..., 0].numpy()
    if bits == TABLES:
        return byte_OI, scale_OK
    pairs = byte_OI.reshape(len(byte_OI), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale_OK


class _Making:
    def __init__(
        self, graph: Any, checkpoint: Checkpoint, rounded: Mapping[str, Rounded], *, half: bool
    ) -> None:
        self.graph, self.checkpoint, self.rounded, self.half = graph, checkpoint, rounded, half
        self.rows = checkpoint.config["vocab_size"]
        self.names = _names(checkpoint, half=half)
        self.dtype = np.float16 if half else np.float32
        self.stored: dict[str, Stored] = {}
        """Tables by their content, so that a tied one is one. Two matrices of layers that hold the
        same stay two: readers of a checkpoint ask for either, and onnxruntime 1.31 computes wrong
        products where two of them read one in float16."""
        self.read: dict[str, Any] = {}

    def product(self, node: Any) -> None:
        x, matrix = node.inputs
        turn = matrix.producer()
        turned = turn is not None and turn.op_type == "Transpose"
        source = turn.inputs[0] if turned else matrix
        stored = _matrix(source)
        if stored is None:
            return
        weights_OI = stored if turned else np.ascontiguousarray(stored.T)
        held = self._hold(source, weights_OI, str(node.outputs[0].name))
        attributes = {
            "K": held.inputs,
            "N": len(weights_OI),
            "bits": held.bits,
            "block_size": QUANTISED_BLOCK,
            # Activations in int8 inside the product: several times as fast on a CPU.
            "accuracy_level": 4,
        }
        made = ir.node("MatMulNBits", [x, held.level, held.scale], attributes, domain=DOMAIN)
        self._replace(node, [made])

    def look_up(self, node: Any) -> None:
        table, tokens = node.inputs
        rows_VD = _matrix(table)
        if rows_VD is None or len(rows_VD) != self.rows:
            return
        held = self._hold(table, rows_VD, str(table.name))
        width = held.scale.shape[1] * QUANTISED_BLOCK
        name = node.outputs[0].name
        zero = constant(self.graph, f"{name}_zero", np.array(1 << held.bits - 1, self.dtype))
        apart = constant(self.graph, f"{name}_apart", np.array([-1]))
        whole = constant(self.graph, f"{name}_whole", np.array([0, 0, width]))
        level = ir.node("Gather", [held.level, tokens])
        real = ir.node("Cast", level.outputs, {"to": ir.DataType.from_numpy(np.dtype(self.dtype))})
        around = ir.node("Sub", [real.outputs[0], zero])
        scale = ir.node("Gather", [held.scale, tokens])
        each = ir.node("Unsqueeze", [scale.outputs[0], apart])
        row = ir.node("Mul", [around.outputs[0], each.outputs[0]])
        flat = ir.node("Reshape", [row.outputs[0], whole])
        steps = [level, real, around, scale, each, row, flat]
        if width != held.inputs:
            first = constant(self.graph, f"{name}_first", np.array([0]))
            end = constant(self.graph, f"{name}_end", np.array([held.inputs]))
            steps.append(ir.node("Slice", [flat.outputs[0], first, end, apart]))
        self._replace(node, steps)

    def forget(self) -> None:
        """Matrices that nothing reads any more, and what turned them."""
        for node in list(self.graph):
            if node.op_type == "Transpose" and not node.outputs[0].uses():
                self.graph.remove(node, safe=True)
        for name in self.read:
            if not self.graph.initializers[name].uses():
                self.graph.initializers.pop(name)

    def _hold(self, source: Any, weights_OI: Array, reader: str) -> Stored:
        self.read[str(source.name)] = source
        digest, bits = _digest(weights_OI), TABLES if len(weights_OI) == self.rows else LAYERS
        key = digest if bits == TABLES else reader
        if key not in self.stored:
            known = self.names.get(digest, [])
            name = known.pop(0) if known else f"{source.name}_{reader}"
            chosen = self.rounded.get(name)
            if chosen is None:
                chosen = nearest(self._stored(name, weights_OI), grid_of(bits, half=self.half))[0]
            level_OB, scale_OK = packed(chosen, bits)
            level_OKS = level_OB.reshape(*scale_OK.shape, -1)
            self.stored[key] = Stored(
                constant(self.graph, f"{name}{LEVELS}", level_OKS),
                constant(self.graph, f"{name}{SCALES}", scale_OK.astype(self.dtype)),
                bits,
                weights_OI.shape[1],
            )
        return self.stored[key]

    def _stored(self, name: str, weights_OI: Array) -> torch.Tensor:
        """What was a matrix before the graph had it in float16."""
        if self.half and name in self.checkpoint.specs:
            return self.checkpoint.tensor(name).float()
        return torch.tensor(weights_OI).float()

    def _replace(self, node: Any, steps: list[Any]) -> None:
        self.graph.insert_before(node, steps)
        before, after = node.outputs[0], steps[-1].outputs[0]
        after.shape, after.dtype = before.shape, before.dtype
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        after.name = before.name
        self.graph.remove(node, safe=True)


def _matrix(value: Any) -> Array | None:
    """What is stored there; None: nothing, or no matrix."""
    if value is None or not value.is_initializer() or len(value.shape) != 2:
        return None
    array: Array = value.const_value.numpy()
    return array if array.dtype in (np.float32, np.float16) else None


def _names(checkpoint: Checkpoint, *, half: bool) -> dict[str, list[str]]:
    """What matrices hold in the graph -> their names: tracing forgets the names of those that it
    turns."""
    found: dict[str, list[str]] = {}
    for name, spec in checkpoint.specs.items():
        if len(spec.shape) == 2:
            held = checkpoint.tensor(name)
            digest = _digest((held.half() if half else held.float()).numpy())
            found.setdefault(digest, []).append(name)
    return found


def _digest(array: Array) -> str:
    return f"{array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
