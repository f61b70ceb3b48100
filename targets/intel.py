"""OpenVINO: a stateful graph, its KV cache held by the runtime, as optimum-intel writes it.

Inputs input_ids, attention_mask, position_ids and beam_idx (which rows of the cache to go on
with), output logits: the names that openvino-genai and `OVModelForCausalLM` look for.

Shapes: B sequences, L new tokens, V vocabulary; O, I outputs and inputs of a matrix product,
G groups of inputs that share one scale, S inputs of a group.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino._offline_transformations import (
    apply_make_stateful_transformation,
    compress_model_transformation,
)

from dotexport.exports.target import QUANTISED_BLOCK, Logits, Tokens

from .growing import GrowingSession

if TYPE_CHECKING:
    from dotexport.exports.encoder_target import Arrays, EncoderGraph, EncoderSession
    from dotexport.models.checkpoint import Checkpoint

Array = NDArray[np.float32]

GRAPH = "openvino_model.xml"
ENCODER = "openvino"  # where sentence-transformers looks for an encoder's
FIXED_INPUTS = ("input_ids", "attention_mask", "position_ids")

# What is verified is what the weights say: left to itself the plugin computes in bfloat16 where the
# processor can, and rounds activations and cache to 8 bits.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class OpenVino:
    """Writes by OpenVINO's own conversion of a torch.export graph; runs on its CPU plugin."""

    name = "openvino"
    summary = "OpenVINO on the CPU: a stateful graph, named as optimum-intel does"
    precisions = ("fp32", "fp16", "int8", "int4")
    weight_bits: ClassVar = {"fp32": (32, 32), "fp16": (16, 16), "int8": (8, 16), "int4": (4.5, 16)}
    row_groups: ClassVar = {"int4": QUANTISED_BLOCK}
    exact_rounding = ()  # blocks are smaller where a width is no multiple of 32
    encoder_precisions = ("fp32", "fp16", "int8")

    def missing(self) -> list[str]:
        return []  # without openvino this file cannot be imported

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .traced import trace_problems

        return trace_problems(checkpoint, precision)

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        from .traced import config_problems

        return config_problems(config, precision)

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        graph = _translate(checkpoint)
        _keep_state(graph, _name_ports(graph), num_heads=_num_kv_heads(checkpoint.config))
        if precision in ("int8", "int4"):
            _round_products(graph, bits=int(precision[3:]))
            _halve_tables(graph)
        _save(graph, folder / GRAPH, precision)
        for file in [checkpoint.folder / "config.json", *checkpoint.companions()]:
            shutil.copyfile(file, folder / file.name)

    def open(self, folder: Path, *, threads: int | None = None) -> OpenVinoSession:
        return OpenVinoSession(folder, threads=threads)

    def write_encoder(self, graph: EncoderGraph, folder: Path, precision: str) -> None:
        model = _converted(graph.program())
        for ports, names in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
            for port, name in zip(ports, names, strict=True):
                port.get_tensor().set_names({name})
        if precision == "int8":
            _round_products(model, bits=8)
            _halve_tables(model)
        (folder / ENCODER).mkdir()
        _save(model, folder / ENCODER / GRAPH, precision)

    def open_encoder(self, folder: Path, *, threads: int | None = None) -> EncoderSession:
        request = _compiled(folder / ENCODER / GRAPH, threads).create_infer_request()

        def run(inputs: Arrays) -> list[Any]:
            made = request.infer(dict(inputs))
            return [made[number].copy() for number in range(len(made))]

        return run


def _translate(checkpoint: Checkpoint) -> Any:
    from .traced import trace

    return _converted(trace(checkpoint))


def _converted(program: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own deprecations
        return ov.convert_model(program)


def _save(graph: Any, file: Path, precision: str) -> None:
    if precision == "fp16":
        compress_model_transformation(graph)
    for option, value in EXACT.items():
        graph.set_rt_info(value, ["runtime_options", option])
    ov.save_model(graph, file, compress_to_fp16=False)


def _compiled(file: Path, threads: int | None) -> Any:
    options: dict[str, Any] = {**EXACT, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(file, OpenVinoSession.providers[0], options)


def _name_ports(graph: Any) -> dict[str, str]:
    """Give inputs and outputs their names; the cache's inputs -> its outputs."""
    inputs, outputs = graph.inputs, graph.outputs
    num_layers = (len(inputs) - len(FIXED_INPUTS)) // 2
    layers = [f"{layer}.{role}" for layer in range(num_layers) for role in ("key", "value")]
    past = [f"past_key_values.{name}" for name in layers]
    present = [f"present.{name}" for name in layers]
    for port, name in zip(inputs, [*FIXED_INPUTS, *past], strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(outputs, ["logits", *present], strict=True):
        port.get_tensor().set_names({name})
    return dict(zip(past, present, strict=True))


def _num_kv_heads(config: Any) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _keep_state(graph: Any, cache: dict[str, str], *, num_heads: int) -> None:
    """Move the cache inside: variables that start empty and are read in the order of beam_idx."""
    beam = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beam])
    for name in cache:
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = ops.gather(port, beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, cache)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            width = node.get_output_partial_shape(0)[3].get_length()
            node.set_arguments([_empty(graph, num_heads, width)])
    graph.validate_nodes_and_infer_types()


def _empty(graph: Any, num_heads: int, width: int) -> Any:
    """A cache of no tokens for as many sequences as input_ids has rows."""
    shape_2 = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch_1 = ops.gather(shape_2, ops.constant(np.array([0])), ops.constant(0))
    rest = ops.constant(np.array([num_heads, 0, width]))
    return ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch_1, rest], axis=0))


def _round_products(graph: Any, *, bits: int) -> None:
    """Store the matrices of products as integers with scales, decompressed where they are read."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weight = node.input_value(1)
        if weight.get_node().get_type_name() != "Constant":
            continue  # a product of activations, or a tied table that is rounded already
        weight_OI = weight.get_node().data.astype(np.float32)
        assert node.get_attributes()["transpose_b"]
        rounded = _decompressed(weight_OI, bits=bits)
        for reader in list(weight.get_target_inputs()):
            reader.replace_source_output(rounded.output(0))
    graph.validate_nodes_and_infer_types()


def _halve_tables(graph: Any) -> None:
    """Store what is only looked up in float16: OpenVINO's own compression does nothing any more,
    once a graph holds other numbers than float32."""
    for node in graph.get_ordered_ops():
        table = node.input_value(0) if node.get_type_name() == "Gather" else None
        if table is None or table.get_node().get_type_name() != "Constant":
            continue
        with np.errstate(over="ignore"):
            half = table.get_node().data.astype(np.float16)
        if table.get_element_type() == ov.Type.f32 and np.isfinite(half).all():
            whole = ops.convert(ops.constant(half), "f32")
            for reader in list(table.get_target_inputs()):
                reader.replace_source_output(whole.output(0))
    graph.validate_nodes_and_infer_types()


def _decompressed(weight_OI: Array, *, bits: int) -> Any:
    outputs, inputs = weight_OI.shape
    # Groups of 32 where they fit, of 16 or 8 for odd widths: padding would keep the plugin from
    # computing with the integers.
    group = math.gcd(inputs, QUANTISED_BLOCK) if bits == 4 else inputs
    level_OGS, scale_OG1 = _levels(weight_OI.reshape(outputs, -1, group), bits=bits)
    # A tensor of its own: one that shares numpy's memory would outlive it.
    stored = ov.Tensor(ov.Type.i4 if bits == 4 else ov.Type.i8, ov.Shape(list(level_OGS.shape)))
    stored.data[...] = _nibbles(level_OGS) if bits == 4 else level_OGS
    scale = ops.constant(scale_OG1.astype(np.float16))
    value_OGS = ops.multiply(ops.convert(ops.constant(stored), "f16"), scale)
    value_OI = ops.reshape(value_OGS, ops.constant(np.array(weight_OI.shape)), special_zero=False)
    return ops.convert(value_OI, "f32")


def _levels(weight_OGS: Array, *, bits: int) -> tuple[NDArray[np.int8], Array]:
    """Nearest of 2^bits levels; the largest entry of a group becomes the lowest and stays exact."""
    low, high = weight_OGS.min(-1, keepdims=True), weight_OGS.max(-1, keepdims=True)
    largest = np.where(high > -low, high, low)
    lowest = -(2 ** (bits - 1))
    scale = np.where(largest == 0, 1, largest / lowest).astype(np.float32)
    level = np.floor(weight_OGS * (1 / scale) + 0.5).clip(lowest, -lowest - 1)
    return level.astype(np.int8), scale


def _nibbles(level: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two 4-bit numbers per byte, the first in the low half."""
    pairs = (level.reshape(-1, 2) & 15).astype(np.uint8)
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)


class OpenVinoSession(GrowingSession):
    """One infer request, whose variables are the cache."""

    providers = ("CPU",)

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self.request = _compiled(folder / GRAPH, threads).create_infer_request()

    def forget(self, num_sequences: int) -> None:
        self.request.reset_state()
        self.beam_B = np.arange(num_sequences, dtype=np.int32)

    def run(self, tokens_BL: Tokens, position_BL: Tokens) -> Logits:
        values = (tokens_BL, self.mask_BT, position_BL)
        inputs = dict(zip(FIXED_INPUTS, values, strict=True)) | {"beam_idx": self.beam_B}
        logits_BLV: Logits = self.request.infer(inputs)["logits"].copy()
        return logits_BLV
