"""A CUDA graph on a machine without a GPU: are its weights the checkpoint's, does it compute right?

The numbers are read back from the file and compared one by one; then the graph runs on the CPU,
operator for operator the same. bfloat16, which onnxruntime cannot multiply on CPUs, runs as a copy
of the graph in float32 with the very values of the file. None of that says what the kernels of
CUDA do: an artifact that was only rehearsed counts as not verified.

Shapes: O, I outputs and inputs of a matrix product.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dotexport.exports.target import Rehearsal

from .builder_weights import builders_name, constants_of, levels, place
from .ort_session import open_decoder

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

Array = NDArray[Any]

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
MOST_NAMED = 5
HALF_MAX = float(np.finfo(np.float16).max)


def rehearse(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str,
    *,
    peak: float,
    threads: int | None = None,
) -> Rehearsal:
    """The graph of `folder` on the CPU, and every weight in it that is not the checkpoint's.

    Between two products onnxruntime keeps float32 on a CPU, so an overflow that CUDA would meet
    there goes unseen; `peak`, the largest magnitude that torch sees, tells of it.
    """
    model = ir.load(folder / "model.onnx")
    wrong = list(_differences(checkpoint, constants_of(model), precision))
    problems = wrong[:MOST_NAMED]
    if len(wrong) > MOST_NAMED:
        problems.append(f"... and {len(wrong) - MOST_NAMED} more weights like these")
    if precision in ("fp16", "int4") and peak > HALF_MAX:
        problems.append(
            f"activations reach {peak:.3g} in torch and float16 ends at {HALF_MAX:.0f}: they would "
            "overflow; export bf16 or fp32"
        )
    if precision != "bf16":
        session, where = open_decoder(folder, threads=threads), "on the CPU"
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            _write_in_float32(model, folder, Path(scratch))
            session = open_decoder(Path(scratch), threads=threads)
        where = "on the CPU in float32"
    return Rehearsal(session, where, tuple(problems))


# Weights ----------------------------------------------------------------------------------------


def _differences(
    checkpoint: Checkpoint, constants: Mapping[str, Any], precision: str
) -> Iterator[str]:
    layers = checkpoint.config["num_hidden_layers"]
    for name in checkpoint.specs:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        tensor = checkpoint.tensor(name)
        problem = _difference(builders_name(name, layers), tensor, constants, precision)
        if problem:
            yield f"{name}: {problem}"


def _difference(name: str, tensor: Any, constants: Mapping[str, Any], precision: str) -> str | None:
    """What is wrong with the stored form of one tensor; None: nothing."""
    stem, skip = place(name, len(tensor), constants)
    expected = tensor.float().numpy()
    if f"{stem}_Q4" in constants:
        return _rounding_fault(expected, *levels(stem, constants, skip, *expected.shape))
    if stem not in constants:
        return "it is not in the graph"
    stored = constants[stem]
    wanted = FLOATS["fp16" if precision == "int4" else precision]
    if stored.dtype != wanted:
        return f"it is stored as {stored.dtype.name}, expected {wanted.name}"
    array = stored.numpy()
    if expected.ndim == 2 and stem.endswith("MatMul.weight"):
        array = array.T
    array = array[skip : skip + len(expected)]
    if array.shape != expected.shape:
        return f"it is stored as {array.shape}, expected {expected.shape}"
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite on both sides
        wrong = (array != expected.astype(array.dtype)).sum()
    return f"{wrong:,} of {expected.size:,} numbers differ from the checkpoint" if wrong else None


def _rounding_fault(expected_OI: Array, level_OI: Array, scale_OI: Array) -> str | None:
    """Half a step is what rounding costs; the highest of 16 levels also takes what lies up to a
    step above it. A scale in float16 is off by 2**-11, which eight steps make 0.004 of one."""
    error_OI = np.abs(level_OI * scale_OI - expected_OI)
    steps_OI = np.where(level_OI == 7, 1.01, 0.51)
    wrong = int((error_OI > steps_OI * np.abs(scale_OI) + 1e-7).sum())
    return f"{wrong:,} of {expected_OI.size:,} numbers are not the nearest level" if wrong else None


# The copy in float32 ----------------------------------------------------------------------------


def _write_in_float32(model: Any, source: Path, folder: Path) -> None:
    """The same graph with every bfloat16 as float32, which holds each of its values."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value.dtype == narrow:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            value.dtype = wide
    nodes = list(graph)
    for value in [*graph.inputs, *graph.outputs, *(v for node in nodes for v in node.outputs)]:
        if value.dtype == narrow:
            value.dtype = wide
    for node in nodes:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", wide)
        if node.op_type == "Constant" and (held := node.attributes.get("value")) is not None:
            tensor = held.as_tensor()
            if tensor.dtype == narrow:
                node.attributes["value"] = ir.AttrTensor(
                    "value", ir.tensor(tensor.numpy().astype(np.float32))
                )
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    shutil.copyfile(source / "genai_config.json", folder / "genai_config.json")
