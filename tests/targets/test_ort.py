"""The ONNX Runtime target: what only it has to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.errors import DotexportError, ParityError, RuntimeMissingError, UsageError
from dotexport.exports.target import find_target, resolve
from dotexport.models.checkpoint import Checkpoint

pytest.importorskip("onnxruntime_genai")
onnx: Any = pytest.importorskip("onnx")

# In a process of its own: the library loads a second onnxruntime.
GENERATE = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=25, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(json.loads(sys.argv[2]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()))
"""


def plain(exported: Any) -> Path:
    """The float32 artifact of one tiny model."""
    folder: Path = exported("wide-heads", "ort-cpu") / "ort-cpu-fp32"
    return folder


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("wide-heads", "fp32"),
        ("wide-heads", "fp16"),
        ("tied-bf16", "fp32"),
        ("biased", "fp32"),
    ],
)
def test_onnxruntime_genai_generates_the_greedy_tokens_of_torch(
    model: str, precision: str, exported: Any, reference_of: Any
) -> None:
    reference = reference_of(model)
    tokens_L, length = reference.sequences[1], reference.prompt_lengths[1]
    folder = exported(model, "ort-cpu") / f"ort-cpu-{precision}"
    command = [sys.executable, "-c", GENERATE, str(folder), json.dumps(tokens_L[:length].tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    generated = json.loads(done.stdout)
    expected = tokens_L.tolist()
    if 2 in expected[length:]:  # generation stops before the end-of-text token
        expected = expected[: expected.index(2, length)]
    assert generated == expected


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2)])
def test_the_tied_table_is_stored_once(precision: str, size: int, exported: Any) -> None:
    folder = exported("tied-bf16", "ort-cpu")
    written = folder / f"ort-cpu-{precision}"
    names = [i.name for i in load(written).graph.initializer]
    assert "model.embed_tokens.weight" not in names
    parameters = Checkpoint.open(folder / "hf").num_parameters
    table, rotary = 90 * 48, 512 * 32
    stored = (written / "model.onnx.data").stat().st_size
    assert stored < (parameters + rotary + table / 2) * size


def test_float16_keeps_its_attention_in_one_operator_and_its_cache_in_float16(
    exported: Any,
) -> None:
    graph = load(exported("wide-heads", "ort-cpu") / "ort-cpu-fp16").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert "MultiHeadAttention" not in operators
    past = [port for port in graph.input if port.name.startswith("past")]
    assert {port.type.tensor_type.elem_type for port in past} == {onnx.TensorProto.FLOAT16}


def test_float16_that_overflows_is_refused(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stream beyond 65504, from weights that float16 holds; float32 computes it with ease."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama("wide-heads"), model)
    weights = load_file(model / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1000
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    arguments = ["export", str(model), "-o", str(out), "--target", "ort-cpu:fp16"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ParityError)
    assert done.exception.exit_code == 3
    assert "NaN or infinite" in str(done.exception)
    assert not (out / "ort-cpu-fp16").exists()


def test_bfloat16_which_no_cpu_multiplies_here_is_no_precision() -> None:
    with pytest.raises(UsageError, match="it writes fp32, fp16, int4"):
        resolve("ort-cpu:bf16")


@pytest.mark.parametrize(
    ("model", "of_layer"),
    # q, k and v are one product where rotary is inside the attention; o, gate, up, down.
    [("wide-heads", 5), ("biased", 7)],
)
def test_int4_rounds_every_matrix_product(model: str, of_layer: int, exported: Any) -> None:
    graph = load(exported(model, "ort-cpu") / "ort-cpu-int4").graph
    operators = [node.op_type for node in graph.node]
    assert "MatMul" not in operators
    assert operators.count("MatMulNBits") == 2 * of_layer + 1  # the output head


def test_rotary_is_inside_the_attention_where_the_heads_allow(exported: Any) -> None:
    inside = load(plain(exported))
    outside = load(exported("biased", "ort-cpu") / "ort-cpu-fp32")
    assert "RotaryEmbedding" not in [node.op_type for node in inside.graph.node]
    assert "RotaryEmbedding" in [node.op_type for node in outside.graph.node]


def test_all_problems_are_listed_at_once(tiny_llama: Callable[[str], Path]) -> None:
    whole = Checkpoint.open(tiny_llama("wide-heads"))
    config = {
        **whole.config,
        "architectures": ["FancyForCausalLM"],
        "head_dim": 12,
        "num_attention_heads": 5,
        "intermediate_size": 90,
        "rope_parameters": {"rope_type": "yarn"},
    }
    problems = find_target("ort-cpu").problems(Checkpoint(Path("/none"), config, {}), "fp32")
    wanted = ["FancyForCausalLM", "5 query heads", "head_dim 12", "yarn", "vocab_size", "tokenizer"]
    assert len(problems) == len(wanted)
    for word, problem in zip(wanted, problems, strict=True):
        assert word in problem


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("MistralForCausalLM", "mistral"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_a_window_that_the_builder_leaves_out_is_refused(
    architecture: str, model_type: str, tiny_llama: Callable[[str], Path]
) -> None:
    folder = tiny_llama("wide-heads")
    config = {
        **Checkpoint.open(folder).config,
        "architectures": [architecture],
        "model_type": model_type,
        "use_sliding_window": True,
    }

    def problems(window: int | None, **changes: Any) -> list[str]:
        windowed = Checkpoint(folder, {**config, "sliding_window": window, **changes}, {})
        return find_target("ort-cpu").problems(windowed, "fp32")

    assert problems(None) == problems(512) == []
    assert "max_position_embeddings from 512 to 64" in problems(64)[0]
    switched_off = problems(64, use_sliding_window=False)
    assert (switched_off == []) == (model_type != "mistral")


def test_a_phi3_of_two_contexts_without_longrope_is_refused_before_the_builder_fails(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    target = find_target("ort-cpu")
    sizes = {"num_hidden_layers": 2, "head_dim": None, "hidden_size": 64, "sliding_window": None}

    def model(original: int) -> Checkpoint:
        contexts = {"max_position_embeddings": 128, "original_max_position_embeddings": original}
        return Checkpoint.open(tiny_model(model_type="phi3", **sizes, **contexts))

    assert target.problems(model(128), "fp32") == []
    target.write(model(128), tmp_path, "fp32")
    [problem] = target.problems(model(64), "fp32")
    assert "takes for longrope" in problem


def test_a_failing_builder_is_quoted(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    broken = Checkpoint(tmp_path, Checkpoint.open(tiny_llama("wide-heads")).config, {})
    with pytest.raises(DotexportError, match="model builder") as caught:
        find_target("ort-cpu").write(broken, tmp_path / "out", "fp32")
    assert "Error" in str(caught.value)


def test_a_prompt_beyond_the_context_is_refused(exported: Any) -> None:
    session = find_target("ort-cpu").open(plain(exported))
    session.start(np.ones((1, 512), dtype=np.int64))
    with pytest.raises(UsageError, match="context of 512"):
        session.step(np.array([1]))


def test_a_graph_is_exact_with_padding_on_the_right_and_wrong_with_padding_on_the_left(
    exported: Any,
) -> None:
    """Its attention counts the tokens of a mask and takes them to lie at the left: why sessions pad
    on the right, and whoever runs such a graph has to."""
    session: Any = find_target("ort-cpu").open(plain(exported))
    prompt_1L = np.array([[5, 9, 3, 7]])
    alone_V = session.start(prompt_1L)[0, -1]
    empty = np.zeros((1, session.kv_heads, 0, session.head_dim), dtype=np.float32)

    def answer(tokens: list[int], mask: list[int], last: int) -> Any:
        feeds = {"input_ids": np.array([tokens]), "attention_mask": np.array([mask])}
        past = dict.fromkeys(session.past, empty)
        return session.session.run([session.logits], {**feeds, **past})[0][0, last]

    tokens = prompt_1L[0].tolist()
    right_V = answer([*tokens, 0, 0], [1, 1, 1, 1, 0, 0], 3)
    left_V = answer([0, 0, *tokens], [0, 0, 1, 1, 1, 1], 5)
    # Float32 sums of a few dozen numbers, in another order.
    np.testing.assert_allclose(right_V, alone_V, atol=1e-5)
    assert np.abs(left_V - alone_V).max() > 1e-2


def test_a_fallen_back_provider_is_an_error(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["Other"])
    with pytest.raises(RuntimeMissingError, match="got Other"):
        find_target("ort-cpu").open(plain(exported))


def test_threads_are_honoured(exported: Any) -> None:
    session: Any = find_target("ort-cpu").open(plain(exported), threads=1)
    assert session.session.get_session_options().intra_op_num_threads == 1


def test_nothing_but_the_artifact_is_in_its_folder(exported: Any) -> None:
    found = {file.name for file in (plain(exported)).iterdir()}
    assert found == {
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def load(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)
