"""A plain ONNX graph with its KV cache outside: for any ONNX runtime, Optimum and transformers.js.

Inputs input_ids, attention_mask, position_ids and past_key_values.N.key/value, outputs logits and
present.N.key/value, standard operators only. fp16 has its cache in float16, too. int8 rounds
weights per output and activations per token (MatMulInteger), so that neither padding nor the rest
of a batch changes what a token gets. Tables are rounded per token; of a tied one, tokens are
columns of the head's matrix. int4 needs ONNX Runtime, in a browser or anywhere (onnx_blocks.py);
int4-fp16 has all else in float16, as browsers want it on a GPU (WebGPU).

Shapes: B sequences, L new tokens, P tokens in the cache, T = P + L, V vocabulary, D width.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from dotexport.exports.target import Logits, Tokens

from .growing import GrowingSession
from .onnx_values import constant
from .ort_session import open_graph

if TYPE_CHECKING:
    import torch

    from dotexport.exports.encoder_target import Arrays, EncoderGraph, EncoderSession
    from dotexport.merging.rounding import Blocks, Rounded
    from dotexport.models.checkpoint import Checkpoint

# Where transformers.js, Optimum and sentence-transformers look for a graph, and how they name it.
BELOW = "onnx"
GRAPHS = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_quantized.onnx",
    "int4": "model_q4.onnx",
    "int4-fp16": "model_q4f16.onnx",
}
FIXED_INPUTS = ("input_ids", "attention_mask", "position_ids")
OPSET = 18
ONE_FILE = 1 << 30  # weights above this many bytes lie beside the graph: protobuf ends at 2 GiB


class Portable:
    """Writes by torch.onnx from a torch.export graph; runs with onnxruntime."""

    name = "onnx"
    summary = "portable ONNX graph with KV cache, in the layout of Optimum and transformers.js"
    precisions = ("fp32", "fp16", "int8", "int4", "int4-fp16")
    exact_rounding = ()  # int4 has the head and tables in 8 bits
    # int4 has a scale per 32 weights, in the dtype that is computed in.
    weight_bits: ClassVar = {
        "fp32": (32, 32),
        "fp16": (16, 16),
        "int8": (8, 8),
        "int4": (5, 9),
        "int4-fp16": (4.5, 8.5),
    }
    cache_bytes: ClassVar = {"fp32": 4, "fp16": 2, "int8": 4, "int4": 4, "int4-fp16": 2}
    encoder_precisions = ("fp32", "fp16", "int8")

    def missing(self) -> list[str]:
        # torch.onnx writes with it, and says so only when it is too late.
        return [] if find_spec("onnxscript") else ["onnxscript: pip install 'dotexport[onnx]'"]

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .traced import trace_problems

        return trace_problems(checkpoint, precision)

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        from .traced import config_problems

        return config_problems(config, precision)

    def write(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: str,
        rounded: Mapping[str, Rounded] | None = None,
    ) -> None:
        half = precision.endswith("fp16")
        model = _translate(checkpoint, half=half)
        _forget_origins(model)
        _turn_matrices(model.graph)
        _share_tables(model.graph)
        if precision == "int8":
            _look_up_columns(model.graph)
            _round_tables(model.graph, _round_products(model.graph))
        if precision.startswith("int4"):
            from . import onnx_blocks

            onnx_blocks.round_in_blocks(model, checkpoint, rounded or {}, half=half)
        for file in [checkpoint.folder / "config.json", *checkpoint.companions()]:
            shutil.copyfile(file, folder / file.name)
        _save(model, folder, precision)

    def grids(self, checkpoint: Checkpoint, precision: str) -> dict[str, Blocks]:
        """The matrices of all layers in int4, by the checkpoint's names."""
        if not precision.startswith("int4"):
            return {}
        from . import onnx_blocks

        return onnx_blocks.grids(checkpoint, half=precision.endswith("fp16"))

    def values(self, checkpoint: Checkpoint, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """What the matrices of an int4 graph are, by the checkpoint's names."""
        from . import onnx_blocks

        return onnx_blocks.values(checkpoint, ir.load(graph_of(folder)).graph)

    def wrong_in_file(
        self, checkpoint: Checkpoint, folder: Path, chosen: Collection[str] = ()
    ) -> list[str]:
        """Epsilons that are not the checkpoint's, and 4-bit matrices that are not its nearest."""
        from .onnx_numbers import wrong_epsilons

        file = graph_of(folder)
        problems = wrong_epsilons(file, checkpoint.config)
        if file.name in (GRAPHS["int4"], GRAPHS["int4-fp16"]):
            from . import onnx_blocks

            problems += onnx_blocks.not_nearest(checkpoint, ir.load(file).graph, chosen)
        return problems

    def open(self, folder: Path, *, threads: int | None = None) -> PortableSession:
        return PortableSession(folder, threads=threads)

    def write_encoder(self, graph: EncoderGraph, folder: Path, precision: str) -> None:
        program = graph.program(half=precision == "fp16")
        model = _written(program, list(graph.inputs), list(graph.outputs))
        for value in model.graph.inputs:
            value.shape = ir.Shape(["batch_size", "sequence_length"])
        _forget_origins(model)
        _turn_matrices(model.graph)
        if precision == "int8":
            _round_tables(model.graph, _round_products(model.graph))
        _save(model, folder, precision)

    def open_encoder(self, folder: Path, *, threads: int | None = None) -> EncoderSession:
        session = open_graph(graph_of(folder), threads)

        def run(inputs: Arrays) -> list[Any]:
            made: list[Any] = session.run(None, dict(inputs))
            return made

        return run


def graph_of(folder: Path) -> Path:
    """The one graph of an artifact; earlier releases put a decoder's beside its config.json."""
    [file] = [*folder.glob("*.onnx"), *(folder / BELOW).glob("*.onnx")]
    return file


def _translate(checkpoint: Checkpoint, *, half: bool = False) -> Any:
    from .traced import trace

    past, present = _cache_names(checkpoint.config["num_hidden_layers"])
    model = _written(trace(checkpoint, half=half), [*FIXED_INPUTS, *past], ["logits", *present])
    _name_axes(model.graph)
    return model


def _written(program: Any, inputs: list[str], outputs: list[str]) -> Any:
    import torch

    # It warns of operators of torchvision, whether or not the model has any.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own deprecations
        written: Any = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return written.model


def _cache_names(num_layers: int) -> tuple[list[str], list[str]]:
    layers = [f"{layer}.{role}" for layer in range(num_layers) for role in ("key", "value")]
    return [f"past_key_values.{name}" for name in layers], [f"present.{name}" for name in layers]


def _name_axes(graph: Any) -> None:
    """The names that Optimum gives: some readers print them, none needs them."""
    new, past = "sequence_length", "past_sequence_length"
    total = f"{past} + {new}"
    names = {"attention_mask": {1: total}, "past": {2: past}, "present": {2: total}}
    for value in [*graph.inputs, *graph.outputs]:
        kind = str(value.name).partition(".")[0].partition("_key")[0]
        axes = {0: "batch_size", **names.get(kind, {1: new})}
        value.shape = ir.Shape([axes.get(i, dim) for i, dim in enumerate(value.shape)])


def _turn_matrices(graph: Any) -> None:
    """Store matrices as MatMul reads them, unless another operator reads them as they are."""
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        [matrix], [turned] = node.inputs, node.outputs
        if matrix is None or not matrix.is_initializer() or len(matrix.uses()) > 1:
            continue
        name, order = matrix.name, node.attributes["perm"].as_ints()
        array = np.ascontiguousarray(matrix.const_value.numpy().transpose(order))
        graph.initializers.pop(name)
        ir.convenience.replace_all_uses_with(turned, constant(graph, name, array))
        graph.remove(node, safe=True)


def _share_tables(graph: Any) -> None:
    """Constant folding may have stored a tied table a second time, turned: read the first again."""
    tables = [node.inputs[0] for node in graph if node.op_type == "Gather"]
    for table in tables:
        if table is None or not table.is_initializer() or len(table.shape or ()) != 2:
            continue
        for other in [v for v in graph.initializers.values() if _is_turned(v, table)]:
            turn = ir.node("Transpose", [table], {"perm": [1, 0]})
            graph.insert_before(graph[0], turn)
            for reader, index in list(other.uses()):
                reader.replace_input_with(index, turn.outputs[0])
            graph.initializers.pop(str(other.name))


def _is_turned(value: ir.Value, table: ir.Value) -> bool:
    one, other = value.const_value, table.const_value
    if one is None or other is None or tuple(one.shape) != tuple(reversed(other.shape.numpy())):
        return False
    return bool(np.array_equal(one.numpy(), other.numpy().T))


def _forget_origins(model: Any) -> None:
    """Every node says which line of which file it was traced from: half of a small graph."""
    for node in model.graph:
        node.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _save(model: Any, folder: Path, precision: str) -> None:
    (folder / BELOW).mkdir()
    file = folder / BELOW / GRAPHS[precision]
    num_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    beside = f"{file.name}_data" if num_bytes > ONE_FILE else None
    ir.save(model, file, external_data=beside)
    if beside:
        _say_beside(folder / "config.json")


def _say_beside(config: Path) -> None:
    """A browser lists no folders: transformers.js asks config.json whether weights lie apart."""
    said = json.loads(config.read_text(encoding="utf-8"))
    said.setdefault("transformers.js_config", {})["use_external_data_format"] = True
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _look_up_columns(graph: Any) -> None:
    """Of a table that is turned for a product, store the matrix that is multiplied with alone."""
    for node in [node for node in graph if node.op_type == "Gather"]:
        table, tokens = node.inputs
        turns = [reader for reader, _ in table.uses() if reader.op_type == "Transpose"]
        if not turns or not table.is_initializer():
            continue
        table_DV = np.ascontiguousarray(table.const_value.numpy().T)
        matrix = constant(graph, f"{table.name}_turned", table_DV)
        columns = ir.node("Gather", [matrix, tokens], {"axis": 1})
        rows = ir.node("Transpose", columns.outputs, {"perm": [1, 2, 0]})
        graph.insert_before(node, [columns, rows])
        for old, new in [(node, rows.outputs[0]), *((turn, matrix) for turn in turns)]:
            ir.convenience.replace_all_uses_with(old.outputs[0], new)
            graph.remove(old, safe=True)
        graph.initializers.pop(table.name)


def _round_tables(graph: Any, rounded: Mapping[Any, tuple[Any, Any]]) -> None:
    """Look up integers, and the step of each token: those of a product where there is one."""
    for node in [node for node in graph if node.op_type == "Gather"]:
        table, tokens = node.inputs
        stored = table.is_initializer() and len(table.shape) == 2
        if table not in rounded and not stored:
            continue
        level, step_V = rounded.get(table) or _round_outputs(graph, table, inputs=1)
        found = ir.node("Gather", [level, tokens], dict(node.attributes))
        real = ir.node("Cast", found.outputs, {"to": ir.DataType.FLOAT})
        made = [found, real, step := ir.node("Gather", [step_V, tokens])]
        if table not in rounded:  # rows (B, L, D), else columns (D, B, L)
            last = constant(graph, f"{table.name}_last", np.array([-1]))
            made.append(step := ir.node("Unsqueeze", [step.outputs[0], last]))
        made.append(product := ir.node("Mul", [real.outputs[0], step.outputs[0]]))
        graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
        graph.remove(node, safe=True)


def _round_products(graph: Any) -> dict[Any, tuple[Any, Any]]:
    """Multiply integers wherever a stored matrix is multiplied with.

    Returns: matrices that were rounded -> levels, and the step of each output.
    """
    matrices: dict[Any, tuple[Any, Any]] = {}
    rounded: dict[Any, tuple[Any, Any]] = {}  # query, key and value read one input
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        x, matrix = node.inputs
        if not matrix.is_initializer() and matrix not in matrices:
            continue
        if x not in rounded:
            rounded[x] = _round_tokens(graph, node, x)
        level, scale = rounded[x]
        if matrix not in matrices:  # DeBERTa multiplies tokens and distances with the same one
            matrices[matrix] = _round_outputs(graph, matrix)
        weight, step_O = matrices[matrix]
        whole = ir.node("MatMulInteger", [level, weight])
        real = ir.node("Cast", whole.outputs, {"to": ir.DataType.FLOAT})
        if _is_biased(node):
            # One after the other: what it fuses otherwise, onnxruntime computes without the bias.
            steps = ir.node("Mul", [real.outputs[0], scale])
            product = ir.node("Mul", [steps.outputs[0], step_O])
        else:
            steps = ir.node("Mul", [scale, step_O])
            product = ir.node("Mul", [real.outputs[0], steps.outputs[0]])
        graph.insert_before(node, [whole, real, steps, product])
        before, after = node.outputs[0], product.outputs[0]
        after.shape, after.dtype = before.shape, ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        after.name = before.name
        graph.remove(node, safe=True)
    return matrices


def _is_biased(product: Any) -> bool:
    readers = [reader for reader, _ in product.outputs[0].uses() if reader.op_type == "Add"]
    return any(value.is_initializer() for reader in readers for value in reader.inputs)


def _round_tokens(graph: Any, before: Any, x: Any) -> tuple[Any, Any]:
    """Each token's features to -127 ... 127, and the step between two of these."""
    last = constant(graph, f"{x.name}_last", np.array([-1]))
    least = constant(graph, f"{x.name}_least", np.array(1e-30, dtype=np.float32))
    share = constant(graph, f"{x.name}_share", np.array(1 / 127, dtype=np.float32))
    size = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [size.outputs[0], last], {"keepdims": 1})
    some = ir.node("Max", [largest.outputs[0], least])
    scale = ir.node("Mul", [some.outputs[0], share])
    ratio = ir.node("Div", [x, scale.outputs[0]])
    nearest = ir.node("Round", ratio.outputs)
    level = ir.node("Cast", nearest.outputs, {"to": ir.DataType.INT8})
    graph.insert_before(before, [size, largest, some, scale, ratio, nearest, level])
    return level.outputs[0], scale.outputs[0]


def _round_outputs(graph: Any, matrix: Any, *, inputs: int = 0) -> tuple[Any, Any]:
    """The matrix in 255 levels with one step per output; the float one leaves the graph.

    Args:
        inputs: the axis of the matrix along which one step holds.
    """
    weights = matrix.const_value.numpy()
    largest = np.abs(weights).max(inputs, keepdims=True)
    step = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    levels = np.rint(weights / step).astype(np.int8)
    graph.initializers.pop(matrix.name)
    return (
        constant(graph, f"{matrix.name}_level", levels),
        constant(graph, f"{matrix.name}_step", step.squeeze(inputs)),
    )


class PortableSession(GrowingSession):
    """onnxruntime; what it says of the cache goes back in at the next step, uncopied."""

    providers = ("CPUExecutionProvider",)

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        import onnxruntime as ort

        self.value: Any = ort.OrtValue.ortvalue_from_numpy
        self.session = open_graph(graph_of(folder), threads)
        self.past = [port for port in self.session.get_inputs() if port.name not in FIXED_INPUTS]
        self.outputs = [port.name for port in self.session.get_outputs()]
        half = {port.type for port in self.past} == {"tensor(float16)"}
        self.dtype = np.float16 if half else np.float32
        self.cache: list[Any] = []

    def forget(self, num_sequences: int) -> None:
        shapes = [(num_sequences, port.shape[1], 0, port.shape[3]) for port in self.past]
        self.cache = [self.value(np.zeros(shape, dtype=self.dtype)) for shape in shapes]

    def run(self, tokens_BL: Tokens, position_BL: Tokens) -> Logits:
        values = map(self.value, (tokens_BL, self.mask_BT, position_BL))
        feed = dict(zip(FIXED_INPUTS, values, strict=True))
        feed |= {port.name: held for port, held in zip(self.past, self.cache, strict=True)}
        logits, *self.cache = self.session.run_with_ort_values(self.outputs, feed)
        logits_BLV: Logits = logits.numpy()
        return logits_BLV
