"""Weights in a graph of onnxruntime-genai's model builder: where they are, and in 4 bits what.

Shapes: O, I outputs and inputs of a matrix product, K blocks of inputs with one scale each, S bytes
of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from dotexport.errors import DotexportError
from dotexport.exports.target import QUANTISED_BLOCK

from .onnx_blocks import packed

if TYPE_CHECKING:
    from dotexport.merging.rounding import Rounded
    from dotexport.models.checkpoint import Checkpoint

Array = NDArray[Any]


def values(checkpoint: Checkpoint, file: Path) -> Iterator[tuple[str, Array]]:
    """What the 4-bit matrices of a graph are, by the checkpoint's names."""
    constants = constants_of(ir.load(file))
    for name, stem, skip in _quantised(checkpoint, constants):
        level_OI, scale_OI = levels(stem, constants, skip, *checkpoint.specs[name].shape)
        yield name, level_OI * scale_OI


def store(checkpoint: Checkpoint, file: Path, rounded: Mapping[str, Rounded]) -> None:
    """Put levels and scales that were chosen in the place of those that the builder took."""
    constants = constants_of(ir.load(file))
    changed: dict[str, Array] = {}
    for name, stem, skip in _quantised(checkpoint, constants):
        if name not in rounded:
            continue
        outputs = constants[f"{stem}_Q4"].shape[0]
        for suffix, rows in zip(("_Q4", "_scales"), packed(rounded[name]), strict=True):
            key = stem + suffix
            if key not in changed:
                changed[key] = np.array(constants[key].numpy())
            changed[key].reshape(outputs, -1)[skip : skip + len(rows)] = rows
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in changed:
            _write(tensor, changed[tensor.name], file.parent)
    onnx.save(model, file)


def _write(tensor: Any, array: Array, folder: Path) -> None:
    """Into the graph, or the file beside it: in the same place, as it takes as many bytes."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    content = array.tobytes()
    if len(content) != int(where["length"]):
        raise DotexportError(
            f"{tensor.name} takes {where['length']} bytes in the builder's file and {len(content)} "
            "here; this release of onnxruntime-genai is not known: export without --calib"
        )
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        file.write(content)


def _quantised(
    checkpoint: Checkpoint, constants: Mapping[str, Any]
) -> Iterator[tuple[str, str, int]]:
    """Names of the checkpoint, the constant that holds each, and its first row there."""
    layers = checkpoint.config["num_hidden_layers"]
    for name, spec in checkpoint.specs.items():
        if len(spec.shape) == 2:
            stem, skip = place(builders_name(name, layers), spec.shape[0], constants)
            if f"{stem}_Q4" in constants:
                yield name, stem, skip


def constants_of(model: Any) -> dict[str, Any]:
    return {name: value.const_value for name, value in model.graph.initializers.items()}


def builders_name(name: str, num_layers: int) -> str:
    """What the builder calls a tensor of the checkpoint.

    >>> builders_name("model.layers.1.self_attn.q_proj.bias", 3)
    'model.layers.1.attn.q_proj.Add.bias'
    >>> builders_name("model.norm.weight", 3)
    'model.layers.3.final_norm_layernorm.weight'
    """
    if name == "model.norm.weight":
        return f"model.layers.{num_layers}.final_norm_layernorm.weight"
    name = name.replace(".self_attn.", ".attn.")
    name = re.sub(r"\.([qk]_norm)\.weight$", r".\1.layernorm.weight", name)
    name = re.sub(r"(_proj|lm_head)\.weight$", r"\1.MatMul.weight", name)
    return re.sub(r"_proj\.bias$", "_proj.Add.bias", name)


def place(name: str, rows: int, constants: Mapping[str, Any]) -> tuple[str, int]:
    """The constant that holds a tensor, and the outputs of it that come before the tensor's."""
    found = re.search(r"\.(q_proj|k_proj|v_proj)\.", name)
    if found:
        packed = name.replace(found[1], "qkv_proj")
        if packed in constants or f"{packed}_Q4" in constants:
            return packed, _before(found[1], rows, packed, constants)
    if name == "model.embed_tokens.weight" and name not in constants:
        return "lm_head.MatMul.weight", 0  # a tied table is stored once
    return name, 0


def _before(role: str, size: int, packed: str, constants: Mapping[str, Any]) -> int:
    """Keys and values are as many, so that the size of any of the three tells the others'."""
    if f"{packed}_Q4" in constants:
        total = constants[f"{packed}_Q4"].shape[0]
    else:
        total = constants[packed].shape[-1]
    return {"q_proj": 0, "k_proj": int(total) - 2 * size, "v_proj": int(total) - size}[role]


def levels(
    stem: str, constants: Mapping[str, Any], skip: int, outputs: int, inputs: int
) -> tuple[Array, Array]:
    """level_OI, -8 to 7, and the scale_OI of each: two levels per byte, the first in the low half,
    8 standing for zero."""
    packed = constants[f"{stem}_Q4"].numpy()
    byte_OKS = packed.reshape(packed.shape[0], -1, QUANTISED_BLOCK // 2)[skip : skip + outputs]
    level = np.stack([byte_OKS & 15, byte_OKS >> 4], axis=-1).astype(np.int8) - 8
    scale = constants[f"{stem}_scales"].numpy().astype(np.float32)
    scale_OK = scale.reshape(packed.shape[0], -1)[skip : skip + outputs]
    scale_OI = np.repeat(scale_OK, QUANTISED_BLOCK, axis=1)[:, :inputs]
    return level.reshape(outputs, -1)[:, :inputs], scale_OI
