"""The MLX target: what only it has to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx: Any = pytest.importorskip("mlx.core")
mlx_lm: Any = pytest.importorskip("mlx_lm")

from mlx_lm.generate import generate_step  # noqa: E402

from dotexport.exports.exporting import export  # noqa: E402
from dotexport.exports.reference import compute_reference  # noqa: E402
from dotexport.exports.target import find_target  # noqa: E402
from dotexport.exports.verifying import check, with_text  # noqa: E402
from dotexport.models.checkpoint import Checkpoint, read_config  # noqa: E402
from dotexport.models.families import find_family  # noqa: E402
from dotexport.models.shapes import read_sizes  # noqa: E402

TARGET: Any = find_target("mlx")
KINDS = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
GEMMA3 = {"model_type": "gemma3_text", "layer_types": KINDS, "tie_word_embeddings": True}


def written(folder: Path, checkpoint: Checkpoint, precision: str) -> Path:
    folder.mkdir()
    TARGET.write(checkpoint, folder, precision)
    return folder


def test_every_precision_computes_what_torch_computes(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    specs = ["mlx:fp16", "mlx:bf16", "mlx:int8"]  # the suite has the others
    for artifact in export(tiny_llama("tied-bf16"), specs, out=tmp_path / "out"):
        assert artifact.parity is not None
        assert artifact.parity.passed
        assert artifact.parity.text is not None


def test_mlx_lm_loads_the_folder_and_writes_on_as_torch_does(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_llama("wide-heads"))
    folder = written(tmp_path / "mlx", checkpoint, "fp32")
    model, tokenizer = mlx_lm.load(str(folder))
    reference = compute_reference(checkpoint, rounded=False, precisions=())
    tokens_L, length = reference.sequences[0], reference.prompt_lengths[0]
    steps = generate_step(mx.array(tokens_L[:length]), model, max_tokens=4)
    assert [token for token, _ in steps] == tokens_L[length : length + 4].tolist()
    assert tokenizer.eos_token_ids == {2}


# What mlx-lm computes otherwise than transformers, unless it is told or written otherwise.
MODELS = {
    # Heads that do not divide the width, which mlx-lm's Granite cannot hold.
    "granite": {"model_type": "granite", "attention_multiplier": 0.1, "attention_bias": True},
    # A width whose root is not a number of bfloat16, and windows that the long text leaves behind.
    "gemma3": {**GEMMA3, "hidden_size": 80, "sliding_window": 16},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_mlx_lm_does_in_its_own_way_is_made_up_for(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_model(num_hidden_layers=2, **MODELS[name]))
    assert TARGET.problems(checkpoint, "fp32") == []
    folder = written(tmp_path / "mlx", checkpoint, "fp32")
    reference = compute_reference(checkpoint, rounded=False, precisions=("fp32",))
    parity = check(TARGET, "fp32", folder, reference, artifact=name)
    assert with_text(parity, TARGET, folder, checkpoint).problems == ()
    assert parity.max_abs < 3e-5  # float32; where it is not made up for, 1e-2 and more


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("mistral", {"sliding_window": 16}, "attends to all"),
        ("gemma2", {"sliding_window": 16, "tie_word_embeddings": True}, "attends to all"),
        ("gemma3_text", {**GEMMA3, "layer_types": KINDS[::-1]}, "do not repeat"),
        ("gemma3_text", {**GEMMA3, "layer_types": KINDS[:1] * 2}, "do not repeat"),
        ("gemma3_text", {**GEMMA3, "tie_word_embeddings": False}, "a head of its own"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {}, "not 4 heads of head_dim 32"),
        ("granite", {"residual_multiplier": 0.2}, "not 4 heads of head_dim 32"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "attention_factor",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "stored quantised"),
        ("gpt2", {}, "architecture"),
    ],
)
def test_what_mlx_lm_would_pass_over_is_refused_from_the_config_alone(
    kind: str, changes: dict[str, Any], said: str
) -> None:
    classes = {"gemma3_text": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = {
        "model_type": kind,
        "architectures": [classes.get(kind, f"{kind.title()}ForCausalLM")],
        **sizes,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        **changes,
    }
    [problem] = TARGET.config_problems(config, "fp32")
    assert said in problem


@pytest.mark.parametrize("precision", ["fp16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("model", ["many-rows", "many-tied-rows", "wide-heads"])
def test_planned_bytes_are_those_of_the_file(
    precision: str, model: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_llama(model))
    folder = written(tmp_path / "mlx", checkpoint, precision)
    family = find_family(checkpoint.config)
    sizes = read_sizes(family, checkpoint.config)
    planned = TARGET.stored_bytes(family, sizes, precision)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert planned == index["metadata"]["total_size"]
    table = 16384 * 64 if model == "many-rows" else 0
    if table and precision == "fp16":
        assert TARGET.read_bytes(family, sizes, precision) == planned - 2 * table


@pytest.mark.parametrize(
    ("model", "group", "kept"), [("many-rows", 32, 0), ("wide-heads", 32, 1 + 3 * 6 + 1)]
)
def test_rows_that_fill_no_group_stay_whole_and_are_named(
    model: str,
    group: int,
    kept: int,
    tiny_llama: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows of 48 and 88 fill none, rows of 64, 96 and 128 fill those of 32."""
    with caplog.at_level(logging.WARNING):
        folder = written(tmp_path / "mlx", Checkpoint.open(tiny_llama(model)), "int4")
    assert read_config(folder)["quantization"] == {"group_size": group, "bits": 4, "mode": "affine"}
    assert bool(kept) == bool(caplog.messages)
    assert all(message.startswith(f"{kept} tensors stay bfloat16") for message in caplog.messages)


def _another_base(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10100.0}))


def _another_epsilon(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.1e-6}))


def _larger_steps(folder: Path) -> None:
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    for part in ("scales", "biases"):
        name = f"model.layers.0.mlp.down_proj.{part}"
        weights[name] = (weights[name].astype(mx.float32) * 1.01).astype(weights[name].dtype)
    mx.eval(weights)
    mx.save_safetensors(file, weights)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_another_base, "reads rope_theta = 10100.0"),
        (_another_epsilon, "reads rms_norm_eps = 1.1e-06"),
        (_larger_steps, "model.layers.0.mlp.down_proj.weight is 1.01"),
    ],
)
def test_what_logits_may_hide_is_found_in_the_file(
    fault: Callable[[Path], None], said: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_llama("many-rows"))
    folder = written(tmp_path / "mlx", checkpoint, "int4")
    assert TARGET.wrong_in_file(checkpoint, folder) == []
    fault(folder)
    [problem] = TARGET.wrong_in_file(checkpoint, folder)
    assert said in problem


def test_a_session_says_in_which_numbers_it_computes(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_llama("wide-heads"))
    device = mx.default_device().type.name
    for precision, number in (("bf16", "bfloat16"), ("int4", "float32")):
        session = TARGET.open(written(tmp_path / precision, checkpoint, precision))
        expected = number if device == "cpu" or precision == "bf16" else "bfloat16"
        assert session.providers == (f"mlx on {device}, {expected}",)
        assert session.start(np.array([[1, 2]])).dtype == np.float32
