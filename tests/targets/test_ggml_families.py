"""GGUF for every class that is written: read back, by transformers, and run in llama.cpp itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint
from dotexport.targets.llamacpp import run
from dotexport.targets.torch_session import TorchSession

gguf: Any = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SQUARE = {"head_dim": None, "hidden_size": 64}
ODD = {"num_attention_heads": 6, "hidden_size": 64}  # 64 is no multiple of 6
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 5.0,
}

# Name -> what differs from conftest.BASE, and whether transformers' own GGUF reader takes it.
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({"model_type": "llama"}, True),
    "llama-linear": ({"model_type": "llama", "rope_parameters": LINEAR}, False),
    "mistral-odd": ({"model_type": "mistral", "sliding_window": None, **ODD}, False),
    "mistral-yarn": (
        {"model_type": "mistral", "sliding_window": None, "rope_parameters": YARN},
        False,
    ),
    "biased": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, False),
    "granite": ({**GRANITE, **ODD, "attention_bias": True, "mlp_bias": True}, False),
    "granite-tied": ({**GRANITE, "tie_word_embeddings": True, "rope_parameters": LLAMA3}, False),
    "qwen2": ({"model_type": "qwen2", **SQUARE}, True),
    "qwen3": ({"model_type": "qwen3", "tie_word_embeddings": True, **ODD}, False),
    "qwen3-yarn": ({"model_type": "qwen3", "rope_parameters": YARN}, False),
    "smollm3": ({"model_type": "smollm3", "num_hidden_layers": 4, **SQUARE}, False),
    "ernie": ({"model_type": "ernie4_5", "tie_word_embeddings": True}, False),
}


def written(model: Path, folder: Path, precision: str = "fp16") -> Path:
    folder.mkdir()
    find_target("gguf").write(Checkpoint.open(model), folder, precision)
    return folder


@pytest.fixture(scope="module")
def of(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Reference]]:
    """Name in MODELS -> the folder of its fp16 file, and what torch says."""

    @cache
    def make(name: str) -> tuple[Path, Reference]:
        model = tiny_model(**MODELS[name][0])
        reference = compute_reference(Checkpoint.open(model), rounded=False)
        return written(model, tmp_path_factory.mktemp(name) / "out"), reference

    return make


@pytest.mark.parametrize("name", MODELS)
def test_every_class_is_read_back(name: str, of: Any) -> None:
    folder, reference = of(name)
    assert check(find_target("gguf"), "fp16", folder, reference, artifact=name).problems == ()


@pytest.mark.parametrize("name", [name for name, (_, read) in MODELS.items() if read])
def test_the_reader_of_transformers_finds_the_same(name: str, of: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder, reference = of(name)
    tokens_BL = reference.sequences[0][None]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype="float32")
    theirs = TorchSession(model.eval()).start(tokens_BL)
    mine = find_target("gguf").open(folder).start(tokens_BL)
    # The same numbers in another class: float32 sums in another order.
    np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-5 * np.abs(mine).max())


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_every_class(name: str, of: Any, llama_cpp: Path) -> None:
    folder, reference = of(name)
    assert run(llama_cpp, folder, "fp16", reference, artifact=name).problems == ()


def test_sizes_are_in_the_words_of_the_architecture(of: Any) -> None:
    granite, qwen3 = (gguf.GGUFReader(of(name)[0] / "model.gguf") for name in ("granite", "qwen3"))
    fields = {name: field.contents() for name, field in granite.fields.items()}
    assert fields["granite.attention.key_length"] == 32
    assert fields["granite.attention.scale"] == pytest.approx(0.1)
    assert fields["granite.embedding_scale"] == 3.0
    assert fields["granite.residual_scale"] == pytest.approx(0.22)
    assert fields["granite.logit_scale"] == 5.0
    assert qwen3.fields["qwen3.attention.key_length"].contents() == 32


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "ernie4_5", "use_bias": True}, "use_bias"),
        (
            {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [1, 0]},
            "not every 4th",
        ),
        ({"model_type": "qwen3", "rope_parameters": LLAMA3}, "left out by llama.cpp's qwen3"),
        ({"model_type": "mistral", "sliding_window": 16}, "attends to all"),
        ({"model_type": "llama", "rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"model_type": "phi3", **SQUARE}, "Phi3ForCausalLM"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "whole heads"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], word: str
) -> None:
    architectures = {
        "qwen3": "Qwen3ForCausalLM",
        "mistral": "MistralForCausalLM",
        "llama": "LlamaForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM",
    }
    config = {
        "architectures": [architectures[changes["model_type"]]],
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "hidden_size": 64,
        **changes,
    }
    [problem] = find_target("gguf").config_problems(config, "fp16")
    assert word in problem


FAULTS = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
    "a swapped layer",
    "head_count_kv",
]


def spoil(file: Path, fault: str) -> None:
    """Plant one fault: every row of a tensor one further, two layers for each other, or a size
    that is not the model's."""
    content, reader = bytearray(file.read_bytes()), gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if fault == "a swapped layer":
        for name, one in tensors.items():
            if name.startswith("blk.0."):
                place(content, one, tensors[name.replace("blk.0.", "blk.2.")])
                place(content, tensors[name.replace("blk.0.", "blk.2.")], one)
    elif fault == "head_count_kv":
        field = reader.fields["llama.attention.head_count_kv"]
        at = int(field.offset) + sum(part.nbytes for part in field.parts[:-1])
        content[at : at + 4] = np.uint32(4).tobytes()
    else:
        tensor = tensors[f"blk.1.{fault}"]
        rows = np.asarray(tensor.data)
        start = int(tensor.data_offset)
        content[start : start + rows.nbytes] = np.roll(rows, 1, axis=0).tobytes()
    file.write_bytes(content)


def place(content: bytearray, tensor: Any, over: Any) -> None:
    start, data = int(over.data_offset), np.asarray(tensor.data).tobytes()
    content[start : start + len(data)] = data


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, of: Any, tmp_path: Path) -> None:
    folder, reference = of("llama")
    spoiled = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(spoiled / "model.gguf", fault)
    parity = check(find_target("gguf"), "fp16", spoiled, reference, artifact=fault)
    assert not parity.passed
    if fault != "head_count_kv":  # with which there is no model
        assert not any("cannot be run" in problem for problem in parity.problems)


@pytest.mark.llamacpp
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_what_llama_cpp_says(
    fault: str, of: Any, llama_cpp: Path, tmp_path: Path
) -> None:
    folder, reference = of("llama")
    spoiled = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(spoiled / "model.gguf", fault)
    assert not run(llama_cpp, spoiled, "fp16", reference, artifact=fault).passed
