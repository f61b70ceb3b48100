"""The OpenVINO target: what only it has to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint

ov: Any = pytest.importorskip("openvino")

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


def plain(exported: Any) -> Path:
    """The float32 artifact of one tiny model."""
    folder: Path = exported("wide-heads", "openvino") / "openvino-fp32"
    return folder


@pytest.mark.parametrize("precision", BITS)
def test_the_weights_take_what_their_precision_says_and_a_tied_table_is_stored_once(
    precision: str, exported: Any
) -> None:
    folder = exported("tied-bf16", "openvino")
    parameters = Checkpoint.open(folder / "hf").num_parameters
    stored = (folder / f"openvino-{precision}" / "openvino_model.bin").stat().st_size
    wanted = parameters * BITS[precision] / 8
    # Scales in float16: one per 8 or 16 weights at int4, one per row at int8.
    scales = {"int4": 0.25 * parameters, "int8": 0.05 * parameters}.get(precision, 0)
    assert wanted <= stored <= wanted + scales + 2000


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_table_that_is_only_looked_up_takes_two_bytes_at_most(
    precision: str, exported: Any
) -> None:
    folder = exported("wide-heads", "openvino")
    graph = ov.Core().read_model(folder / f"openvino-{precision}" / "openvino_model.xml")
    constants = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"]
    tables = [node for node in constants if list(node.shape) == [90, 48]]
    assert {str(node.get_element_type()) for node in tables} == {"<Type: 'float16'>"}


def test_names_are_those_of_optimum_intel_and_the_cache_is_inside(exported: Any) -> None:
    graph = ov.Core().read_model(plain(exported) / "openvino_model.xml")
    names = {port.get_any_name() for port in graph.inputs}
    assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert [port.get_any_name() for port in graph.outputs] == ["logits"]
    assert len(graph.get_sinks()) == 2 * 2  # a key and a value of each layer


def test_the_cache_follows_the_beam(exported: Any) -> None:
    session: Any = find_target("openvino").open(plain(exported))
    one_BL, other_BL = np.array([[3, 4, 5], [6, 7, 8]]), np.array([[6, 7, 8], [6, 7, 8]])
    session.start(other_BL)
    expected_BV = session.step(np.array([9, 9]))
    session.start(one_BL)
    session.beam_B = np.array([1, 1], dtype=np.int32)  # both go on from the second prompt
    np.testing.assert_allclose(session.step(np.array([9, 9])), expected_BV, atol=1e-5)


def test_the_artifact_says_that_it_is_to_be_computed_exactly(exported: Any) -> None:
    graph = ov.Core().read_model(plain(exported) / "openvino_model.xml")
    for option in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"):
        assert graph.get_rt_info(["runtime_options", option]).value == "f32"


def test_threads_are_honoured(exported: Any) -> None:
    session: Any = find_target("openvino").open(plain(exported), threads=1)
    compiled = session.request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_all_problems_are_listed_at_once(tiny_llama: Callable[[str], Path]) -> None:
    whole = Checkpoint.open(tiny_llama("wide-heads"))
    config = {
        **whole.config,
        "rope_parameters": {"rope_type": "dynamic"},
        "layer_types": ["full_attention", "linear_attention"],
        "quantization_config": {"quant_method": "gptq"},
        "is_encoder_decoder": True,
    }
    problems = find_target("openvino").problems(Checkpoint(whole.folder, config, {}), "fp32")
    wanted = ["dynamic", "linear_attention", "quantised", "encoder-decoder"]
    assert len(problems) == len(wanted)
    for word, problem in zip(wanted, problems, strict=True):
        assert word in problem


def swap_two_matrices(graph: Any) -> None:
    first, second = [
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and list(node.shape) == [88, 48]
    ][:2]
    one, other = (list(node.output(0).get_target_inputs()) for node in (first, second))
    for reader in one:
        reader.replace_source_output(second.output(0))
    for reader in other:
        reader.replace_source_output(first.output(0))


def drop_the_mask(graph: Any) -> None:
    mask = graph.input("attention_mask")
    readers = mask.get_target_inputs()
    ones = ov.opset13.equal(mask, mask)
    same = ov.opset13.convert(ones, "i64")
    for reader in readers:
        reader.replace_source_output(same.output(0))


def change_one_weight(graph: Any) -> None:
    matrix = next(
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and list(node.shape) == [88, 48]
    )
    values = matrix.data.copy()
    values[0, 0] += 10 * values.std()
    readers = list(matrix.output(0).get_target_inputs())
    changed = ov.opset13.constant(values)
    for reader in readers:
        reader.replace_source_output(changed.output(0))


@pytest.mark.parametrize("fault", [None, swap_two_matrices, drop_the_mask, change_one_weight])
def test_a_fault_in_a_written_graph_is_found(
    fault: Callable[[Any], None] | None, exported: Any, reference_of: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain(exported), tmp_path / "copy"))
    graph = ov.Core().read_model(folder / "openvino_model.xml")
    if fault is not None:
        fault(graph)
    (tmp_path / "changed").mkdir()
    ov.save_model(graph, tmp_path / "changed" / "openvino_model.xml", compress_to_fp16=False)
    target = find_target("openvino")
    reference = reference_of("wide-heads")
    parity = check(target, "fp32", tmp_path / "changed", reference, artifact="under test")
    assert parity.passed == (fault is None), parity
    assert not any("cannot be run" in problem for problem in parity.problems)
