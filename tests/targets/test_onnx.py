"""The portable ONNX target: what only it has to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.exports.exporting import export
from dotexport.exports.reference import compute_reference
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.merging.rounding import nearest
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions

from ..models.changed_models import rewritten

pytest.importorskip("onnxscript")
onnx: Any = pytest.importorskip("onnx")
ir: Any = pytest.importorskip("onnx_ir")
ort: Any = pytest.importorskip("onnxruntime")


# Where transformers.js and Optimum look for the graph.
FILES = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
    "int4-fp16": "onnx/model_q4f16.onnx",
}
INT4 = {"int4": 4, "int4-fp16": 2}
"""Bytes of a scale."""


def load(folder: Path) -> Any:
    return onnx.load(folder / FILES[folder.name.removeprefix("onnx-")])


def axes(port: Any) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]


def test_names_and_axes_are_those_of_optimum(exported: Any) -> None:
    graph = load(exported("wide-heads", "onnx") / "onnx-fp32").graph
    inputs, outputs = ({p.name: axes(p) for p in ports} for ports in (graph.input, graph.output))
    cache = [f"{layer}.{role}" for layer in range(2) for role in ("key", "value")]
    assert list(inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    new, past = "sequence_length", "past_sequence_length"
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", new]
    assert inputs["attention_mask"] == ["batch_size", f"{past} + {new}"]
    assert inputs["past_key_values.0.key"] == ["batch_size", 2, past, 32]
    assert outputs["present.1.value"] == ["batch_size", 2, f"{past} + {new}", 32]
    assert outputs["logits"] == ["batch_size", new, 90]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_any_runtime_has_the_operators(precision: str, exported: Any) -> None:
    model = load(exported("wide-heads", "onnx") / f"onnx-{precision}")
    assert [opset.domain for opset in model.opset_import] == [""]
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_weights_take_what_their_precision_says_and_a_tied_table_is_stored_once(
    precision: str, exported: Any
) -> None:
    folder = exported("tied-bf16", "onnx")
    parameters = Checkpoint.open(folder / "hf").num_parameters
    stored = sum(len(i.raw_data) for i in load(folder / f"onnx-{precision}").graph.initializer)
    # int8 leaves norms in float32 and adds a float32 step per output and token.
    wanted = parameters * {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    assert wanted <= stored <= wanted + (0.1 * parameters + 3000 if precision == "int8" else 1000)


@pytest.mark.parametrize("precision", INT4)
@pytest.mark.parametrize("model", ["wide-heads", "tied-bf16", "biased"])
def test_int4_holds_every_matrix_in_blocks_and_a_tied_table_once(
    model: str, precision: str, exported: Any
) -> None:
    out = exported(model, "onnx")
    graph, source = load(out / f"onnx-{precision}").graph, Checkpoint.open(out / "hf")
    products = [node for node in graph.node if node.op_type.startswith("MatMul")]
    kinds = [node.op_type for node in products]
    assert kinds.count("MatMulNBits") == 2 * 7 + 1
    assert kinds.count("MatMul") == 2 * 2  # attention multiplies activations with each other
    sizes = {i.name: len(i.raw_data) for i in graph.initializer}
    wanted = 0
    for spec in source.specs.values():
        if len(spec.shape) == 2:
            rows, blocks = spec.shape[0], -(-spec.shape[1] // 32)
            wanted += rows * blocks * (INT4[precision] + (32 if rows == 90 else 16))
    assert wanted <= sum(sizes.values()) <= wanted + 2 * 4 * 1000  # norms, biases, constants
    target: Any = find_target("onnx")
    found = dict(target.values(source, out / f"onnx-{precision}"))
    grids = target.grids(source, precision)
    assert len(grids) == 2 * 7
    assert found.keys() >= grids.keys()
    for name, grid in grids.items():
        assert torch.equal(found[name], nearest(source.tensor(name), grid)[1])


@pytest.mark.parametrize("precision", INT4)
@pytest.mark.parametrize("model", ["wide-heads", "tied-bf16"])
def test_int4_looks_tokens_up_within_a_step_of_each_block(
    model: str, precision: str, exported: Any
) -> None:
    """Rows of 48 numbers end within their second block."""
    folder = exported(model, "onnx")
    table_VD = Checkpoint.open(folder / "hf").tensor("model.embed_tokens.weight").float().numpy()
    graph = load(folder / f"onnx-{precision}")
    blocks = {n.output[0] for n in graph.graph.node if n.op_type == "Reshape"}
    cut = [n for n in graph.graph.node if n.op_type == "Slice" and n.input[0] in blocks]
    found_VD = looked_up(graph, cut[0].output[0])[0].astype(np.float32)
    padded = np.pad(np.abs(table_VD), ((0, 0), (0, 16))).reshape(90, 2, 32).max(-1)
    step_VD = np.repeat(padded / 128, 32, axis=1)[:, :48]
    # A whole step where the opposite of the largest asks for level 128; else half of one.
    # In float16 both the step and the product are rounded besides, each by 2^-11 at most.
    halved = 2**-10 * np.abs(table_VD) if precision.endswith("fp16") else 0.0
    assert (np.abs(found_VD - table_VD) <= 1.01 * step_VD + halved).all()
    assert 0 < np.abs(found_VD - table_VD).mean() < 0.3 * step_VD.mean()


def test_the_graph_does_not_tell_where_it_was_made(exported: Any) -> None:
    text = (exported("wide-heads", "onnx") / "onnx-fp32/onnx/model.onnx").read_bytes()
    assert b".py" not in text
    assert str(Path.home()).encode() not in text


def test_int8_rounds_every_product_with_a_matrix(exported: Any) -> None:
    graph = load(exported("wide-heads", "onnx") / "onnx-int8").graph
    products = [node.op_type for node in graph.node if node.op_type.startswith("MatMul")]
    assert products.count("MatMulInteger") == 2 * 7 + 1
    assert products.count("MatMul") == 2 * 2  # attention multiplies activations with each other


@pytest.mark.parametrize("model", ["wide-heads", "tied-bf16"])
def test_int8_looks_tokens_up_within_half_a_step_of_each(model: str, exported: Any) -> None:
    """Of a tied table too, whose tokens are columns of the head's matrix there."""
    folder = exported(model, "onnx")
    graph = load(folder / "onnx-int8")
    table_VD = Checkpoint.open(folder / "hf").tensor("model.embed_tokens.weight").float().numpy()
    [value] = [
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "Mul" and set(node.input) & lookups(graph.graph)
    ][:1]
    found = looked_up(graph, value)
    found_VD = found[:, 0].T if model == "tied-bf16" else found[0]
    step_V1 = np.abs(table_VD).max(1, keepdims=True) / 127
    assert (np.abs(found_VD - table_VD) <= 0.501 * step_V1).all()
    assert np.abs(found_VD - table_VD).max() > 0


def looked_up(graph: Any, value: str) -> Any:
    """What a graph computes there when it reads every token once."""
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    session = ort.InferenceSession(graph.SerializeToString())
    tokens_1L = np.arange(90)[None]
    dtypes = {"tensor(float16)": np.float16}
    feed = {
        port.name: np.zeros(
            (1, *(d if isinstance(d, int) else 0 for d in port.shape[1:])),
            dtypes.get(port.type, np.float32),
        )
        for port in session.get_inputs()
    }
    feed |= {"input_ids": tokens_1L, "position_ids": tokens_1L, "attention_mask": tokens_1L * 0 + 1}
    return session.run([value], feed)[0]


def test_int8_keeps_the_biases_of_products(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused with a scale per token, onnxruntime 1.31 computes a product without its bias."""
    from dotexport.targets import portable

    model = tiny_model(model_type="qwen2", num_hidden_layers=2, max_position_embeddings=128)
    reference = compute_reference(Checkpoint.open(model))
    target, kl = find_target("onnx"), []
    for word, as_it_was in (("kept", False), ("fused", True)):
        if as_it_was:
            monkeypatch.setattr(portable, "_is_biased", lambda product: False)
        (folder := tmp_path / word).mkdir()
        target.write(Checkpoint.open(model), folder, "int8")
        parity = check(target, "int8", folder, reference, artifact="onnx-int8")
        kl.append(parity.kl)
    assert 50 * kl[0] < kl[1]  # a rounding costs far less than biases of the size of a tenth


def lookups(graph: Any) -> set[str]:
    """What is cast from integers that tokens looked up."""
    picked = {n.output[0] for n in graph.node if n.op_type == "Gather" and "input_ids" in n.input}
    return {n.output[0] for n in graph.node if n.op_type == "Cast" and n.input[0] in picked}


def test_weights_beside_the_graph_are_told_to_transformers_js(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dotexport.targets import portable

    monkeypatch.setattr(portable, "ONE_FILE", 1000)
    target, checkpoint = find_target("onnx"), Checkpoint.open(tiny_llama("square"))
    target.write(checkpoint, tmp_path, "fp32")
    assert (tmp_path / "onnx/model.onnx_data").stat().st_size > 1000
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert said.pop("transformers.js_config") == {"use_external_data_format": True}
    assert said == json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))


def test_a_graph_where_earlier_releases_put_it_is_read(exported: Any, tmp_path: Path) -> None:
    from dotexport.targets.portable import graph_of

    folder = Path(shutil.copytree(exported("wide-heads", "onnx") / "onnx-int8", tmp_path / "old"))
    file = (folder / "onnx/model_quantized.onnx").rename(folder / "model.onnx")
    assert graph_of(folder) == file
    logits_BLV = find_target("onnx").open(folder).start(np.array([[1, 2, 3]]))
    assert np.isfinite(logits_BLV).all()


def test_a_large_matrix_is_stored_as_it_is_multiplied() -> None:
    from dotexport.targets.portable import _turn_matrices

    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    weight = ir.Value(name="w", const_value=ir.tensor(array))
    x = ir.Value(name="x")
    turn = ir.node("Transpose", [weight], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turn.outputs[0]])
    graph: Any = ir.Graph([x], product.outputs, nodes=[turn, product], initializers=[weight])
    _turn_matrices(graph)
    assert [node.op_type for node in graph] == ["MatMul"]
    [stored] = graph.initializers.values()
    np.testing.assert_array_equal(stored.const_value.numpy(), array.T)


def test_without_onnxscript_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "from dotexport.exports.target import find_target\n"
        "from dotexport.exports.verifying import require_runtime\n"
        "from dotexport.errors import RuntimeMissingError\n"
        "try: require_runtime(find_target('onnx'))\n"
        "except RuntimeMissingError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dotexport[onnx]'" in done.stdout


OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
said = []
for prompt in json.loads(sys.argv[2]):
    ids = torch.tensor([prompt])
    # An end-of-text token must not end it, and none is padding: so it is for torch, too.
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    said.append(out[0, len(prompt):].tolist())
print(json.dumps(said))
"""


def holds_in_optimum(model: Path, folder: Path) -> None:
    """What ORTModelForCausalLM generates from the graph of a model is what torch does."""
    if "DOTEXPORT_OPTIMUM_PYTHON" not in os.environ:
        pytest.skip(
            "set DOTEXPORT_OPTIMUM_PYTHON to the Python of an environment with optimum-onnx"
        )
    folder.mkdir()
    find_target("onnx").write(Checkpoint.open(model), folder, "fp32")
    reference = compute_reference(Checkpoint.open(model), rounded=False)
    pairs = list(zip(reference.sequences, reference.prompt_lengths, strict=True))
    prompts = json.dumps([tokens_L[:length].tolist() for tokens_L, length in pairs])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["DOTEXPORT_OPTIMUM_PYTHON"], "-c", OPTIMUM, str(folder), prompts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == [tokens_L[length:].tolist() for tokens_L, length in pairs]


@pytest.mark.optimum
def test_optimum_loads_the_folder_and_generates_the_tokens_of_torch(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where head_dim is hidden_size / heads: Optimum 0.1.0 computes it so, whatever config says."""
    holds_in_optimum(tiny_llama("square"), tmp_path / "onnx-fp32")


@pytest.mark.heavy
@pytest.mark.optimum
@pytest.mark.parametrize("family", ["mistral", "qwen3", "granite"])
def test_optimum_generates_the_tokens_of_other_classes(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    square = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}
    model = tiny_model(model_type=family, num_hidden_layers=2, sliding_window=None, **square)
    holds_in_optimum(model, tmp_path / "onnx-fp32")


@pytest.mark.heavy
@pytest.mark.optimum
def test_optimum_generates_the_tokens_of_a_model_that_was_narrowed_square(tmp_path: Path) -> None:
    options = ShrinkOptions(
        sizes=SizeOptions(params="0.7x", square=True),
        text=TextOptions(source="embedded:calibration", samples=8, seqlen=128),
        narrow=NarrowOptions(local=None),
    )
    after = shrink(MODEL_DIR, tmp_path / "out", options, device="cpu").plan.after
    assert after.hidden_size == after.num_attention_heads * after.head_dim == 192
    holds_in_optimum(tmp_path / "out/hf", tmp_path / "onnx-fp32")


# --- planted faults, on a graph that was written


def values(graph: Any, name: str) -> np.ndarray:
    return np.array(graph.initializers[name].const_value.numpy())


def put(graph: Any, name: str, array: np.ndarray) -> None:
    graph.initializers[name].const_value = ir.tensor(array, name=name)


def matrices(graph: Any, shape: tuple[int, ...]) -> list[str]:
    """Names of the stored matrices of a shape, in the order of the layers."""
    return [n for n, v in graph.initializers.items() if tuple(v.const_value.shape) == shape]


def first(graph: Any, operator: str) -> Any:
    return next(node for node in graph if node.op_type == operator)


def nothing(graph: Any) -> None:
    """The control: writing a graph again as it was must pass, or the faults prove nothing."""


def one_weight_changed(graph: Any) -> None:
    name = matrices(graph, (88, 48))[1]
    array = values(graph, name)
    array[0, 0] += 10 * array.std()
    put(graph, name, array)


def table_rounded(graph: Any) -> None:
    [name] = matrices(graph, (90, 48))
    put(graph, name, np.trunc(values(graph, name) * 64) / 64)


def layers_swapped(graph: Any) -> None:
    one, other = matrices(graph, (88, 48))[:2]
    first_array, second_array = values(graph, one), values(graph, other)
    put(graph, one, second_array)
    put(graph, other, first_array)


def gate_and_up_swapped(graph: Any) -> None:
    one, other = matrices(graph, (48, 88))[:2]
    first_array, second_array = values(graph, one), values(graph, other)
    put(graph, one, second_array)
    put(graph, other, first_array)


def mask_dropped(graph: Any) -> None:
    mask = next(port for port in graph.inputs if port.name == "attention_mask")
    readers = list(mask.uses())
    same = ir.node("Equal", [mask, mask])
    ones = ir.node("Cast", same.outputs, {"to": ir.DataType.INT64.value})
    graph.insert_before(graph[0], [same, ones])
    for reader, index in readers:
        reader.replace_input_with(index, ones.outputs[0])


def positions_shifted(graph: Any) -> None:
    position = next(port for port in graph.inputs if port.name == "position_ids")
    readers = list(position.uses())
    later = ir.node("Add", [position, position])
    graph.insert_before(graph[0], later)
    for reader, index in readers:
        reader.replace_input_with(index, later.outputs[0])


def cache_not_kept(graph: Any) -> None:
    """present.0.key answers with what came in: the cache of one layer forgets a token."""
    keys = next(port for port in graph.outputs if port.name == "present.0.key")
    values_of = next(port for port in graph.outputs if port.name == "present.0.value")
    same = ir.node("Identity", [values_of])
    graph.append(same)
    same.outputs[0].name, same.outputs[0].shape = "present.0.key", keys.shape
    same.outputs[0].dtype = keys.dtype
    keys.name = "present.0.key.lost"
    graph.outputs[list(graph.outputs).index(keys)] = same.outputs[0]


def norm_without_its_scale(graph: Any) -> None:
    name = matrices(graph, (48,))[-1]
    put(graph, name, np.ones(48, dtype=np.float32))


def activation_changed(graph: Any) -> None:
    node = first(graph, "Sigmoid")
    other = ir.node("HardSigmoid", node.inputs)
    graph.insert_before(node, other)
    ir.convenience.replace_all_uses_with(node.outputs, other.outputs)
    graph.remove(node, safe=True)


def a_weight_that_is_no_number(graph: Any) -> None:
    name = matrices(graph, (48, 88))[2]
    array = values(graph, name)
    array[0, 0] = np.nan
    put(graph, name, array)


FAULTS = [
    one_weight_changed,
    table_rounded,
    layers_swapped,
    gate_and_up_swapped,
    mask_dropped,
    positions_shifted,
    cache_not_kept,
    norm_without_its_scale,
    activation_changed,
    a_weight_that_is_no_number,
]


@pytest.mark.parametrize("fault", [nothing, *FAULTS])
def test_each_of_ten_faults_in_a_written_graph_is_found(
    fault: Callable[[Any], None], exported: Any, reference_of: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported("wide-heads", "onnx") / "onnx-fp32", tmp_path / "copy"))
    model = ir.load(folder / "onnx/model.onnx")
    fault(model.graph)
    ir.save(model, folder / "onnx/model.onnx")
    reference = reference_of("wide-heads")
    parity = check(find_target("onnx"), "fp32", folder, reference, artifact="under test")
    assert parity.passed == (fault is nothing), parity
    # Found by what it computes, not because it would not load.
    assert not any("cannot be run" in problem for problem in parity.problems)


@pytest.mark.parametrize("precision", INT4)
def test_layers_that_hold_the_same_matrix_are_two(
    precision: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """Copied layers, or zeros; what they compute is held against torch."""

    def copied(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1))
        tensors[second].copy_(tensors[first])
        tensors["model.layers.2.mlp.down_proj.weight"].zero_()
        tensors["model.layers.2.self_attn.o_proj.weight"].zero_()

    model = rewritten(tiny_llama("wide-heads"), tmp_path / "model", copied)
    [made] = export(model, [f"onnx:{precision}"], out=tmp_path / "out")
    found = dict(find_target("onnx").values(Checkpoint.open(model), made.folder))  # type: ignore[attr-defined]
    assert len(found) == 3 * 7 + 2
