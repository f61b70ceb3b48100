"""Models that cannot be narrowed are refused by name, and nothing is left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dotexport.errors import CheckpointError
from dotexport.models import checkpoint

from .conftest import (
    NARROW,
    UP,
    Command,
    configured,
    names,
    refused,
    shrinking_of,
    weighted,
    written,
)


def truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", 50_000)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def sharded_but_one(model: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (model / "model.safetensors").rename(model / shards[0])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (model / checkpoint.INDEX).write_text(json.dumps(index))


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "no model folder": (
        lambda m: (m / "config.json").unlink(),
        1,
        ["is not a model folder", "config.json and *.safetensors"],
    ),
    "config is no JSON": (
        lambda m: written(m / "config.json", "{"),
        1,
        ["config.json is not valid JSON", "take a fresh copy"],
    ),
    "config is a list": (
        lambda m: written(m / "config.json", "[]"),
        1,
        ["must hold a JSON object"],
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        1,
        ["lacks model.safetensors", "download the model again"],
    ),
    "pickled weights": (pickled, 1, ["pytorch_model.bin", "save_pretrained"]),
    "missing shard": (
        sharded_but_one,
        1,
        ["lacks model-00002-of-00002.safetensors", "1 of 2", "download"],
    ),
    "broken index": (
        lambda m: written(m / checkpoint.INDEX, '{"weights": {}}'),
        1,
        [checkpoint.INDEX, "expected a weight_map", "download it again"],
    ),
    "truncated weights": (truncated, 1, ["model.safetensors", "truncated", "download it again"]),
    "large-file pointer": (
        lambda m: written(m / "model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        1,
        ["cannot be read as safetensors", "download it again"],
    ),
    "unknown architecture": (
        configured(architectures=["FooForCausalLM"], model_type="foo"),
        5,
        ["FooForCausalLM is not supported", "LlamaForCausalLM", "adding-a-family"],
    ),
    "another model_type": (
        configured(model_type=None),
        1,
        ["model_type = None beside LlamaForCausalLM", "expected 'llama'", "take the config.json"],
    ),
    "quantised": (
        configured(quantization_config={"quant_method": "gptq"}),
        5,
        ["already quantised", "narrow the float model first"],
    ),
    "integer weights": (
        weighted(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        1,
        [UP, "stored as I8", "expected one of F64, F32, F16, BF16"],
    ),
    "NaN": (
        weighted(lambda t: t[UP].fill_(float("nan"))),
        1,
        [UP, "NaN", "expected finite weights", "undamaged copy"],
    ),
    "weights whose activations overflow": (
        weighted(lambda t: t[UP].fill_(3e38)),
        1,
        ["activations on the calibration text are NaN or infinite", "undamaged copy", "bfloat16"],
    ),
    "other shapes": (
        configured(intermediate_size=96),
        1,
        ["mlp.gate_proj.weight has shape (88, 48)", "config.json says (96, 48)"],
    ),
    "missing tensor": (
        weighted(lambda t: t.pop(UP)),
        1,
        [f"lacks 1 of the 30 tensors its config.json calls for, first {UP}", "complete copy"],
    ),
    "foreign tensors": (
        weighted(lambda t: t.update({"model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(3)})),
        1,
        ["LlamaForCausalLM has no place for (1, first", "lora_A", "merge adapters"],
    ),
    "a size that is none": (
        configured(num_attention_heads="four"),
        1,
        ["num_attention_heads = 'four'", "expected a positive integer"],
    ),
    "more layers than any model": (
        configured(num_hidden_layers=10**9),
        1,
        ["num_layers = 1,000,000,000, more than 10,000"],
    ),
    "a context that is none": (
        configured(max_position_embeddings="long"),
        1,
        ["max_position_embeddings", "'long'", "expected"],
    ),
    "no tokenizer": (without_tokenizer, 1, ["has no tokenizer", "tokenizer.json", "expected"]),
    "broken tokenizer": (
        lambda m: written(m / "tokenizer.json", "{"),
        1,
        ["has no tokenizer that transformers can load", "tokenizer.json"],
    ),
    "smaller vocabulary than the tokenizer's": (
        lambda m: (
            weighted(
                lambda t: t.update(
                    {
                        name: t[name][:5].clone()
                        for name in ("model.embed_tokens.weight", "lm_head.weight")
                    }
                )
            )(m),
            configured(vocab_size=5)(m),
        ),
        1,
        ["gives the token", "beyond the model's vocabulary of 5", "belongs to another model"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_be_read_is_refused(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    break_it, code, words = BROKEN[name]
    break_it(model)
    refused(dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW)), code, *words)
    assert names(tmp_path) == ["model", "text.txt"]


def test_the_sound_model_is_narrowed(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    """Otherwise every refusal here could have another reason."""
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW, "--json"))
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["sizes"]["intermediate_size"] == [88, 40]


def test_planning_refuses_what_shrinking_would(dotexport: Command, model: Path) -> None:
    configured(quantization_config={})(model)
    refused(dotexport("plan", model, "--params", "0.7x"), 5, "already quantised")


def test_planning_estimates_for_the_text_that_will_be_read(dotexport: Command, model: Path) -> None:
    found = {}
    for samples in ("16", "4096"):
        outcome = dotexport(
            "plan", model, *NARROW, "--samples", samples, "--seqlen", "64", "--json"
        )
        found[samples] = json.loads(outcome.out)
    for cost in ("shrink_seconds", "shrink_memory_bytes"):
        assert found["16"][cost] < found["4096"][cost]
    refused(dotexport("plan", model, *NARROW, "--samples", "0"), 2, "samples")


def test_planning_estimates_what_several_processes_share(dotexport: Command, model: Path) -> None:
    """Of 4096 windows each has its share; solves and sampled text are the first one's."""
    asked = ("plan", model, *NARROW, "--samples", "4096", "--seqlen", "64")
    one, four = (json.loads(dotexport(*asked, "--processes", n, "--json").out) for n in ("1", "4"))
    for cost in ("shrink_seconds", "shrink_memory_bytes"):
        assert one[cost] / 4 < four[cost] < one[cost]
    assert four["processes"] == 4
    assert four["exchanged_bytes"] > 0
    assert "exchanged_bytes" not in one
    shown = dotexport(*asked, "--processes", "4").out
    assert "in each of 4 processes" in shown
    assert "sent between them" in shown
    refused(dotexport(*asked, "--processes", "0"), 2, "processes")


def test_planning_estimates_distillation_where_it_is_asked_for(
    dotexport: Command, model: Path
) -> None:
    found = {
        heal: json.loads(dotexport("plan", model, *NARROW, "--heal", heal, "--json").out)
        for heal in ("local", "10k", "10M")
    }
    assert "distillation_seconds" not in found["local"]
    seconds = [found[heal]["distillation_seconds"] for heal in ("10k", "10M")]
    assert 0 <= seconds[0] < seconds[1]
    refused(dotexport("plan", model, *NARROW, "--heal", "10x"), 2, "--heal '10x' is not known")


def test_a_value_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    writer = checkpoint.CheckpointWriter(
        tmp_path, {"w": checkpoint.TensorSpec((2,), torch.float16)}
    )
    with pytest.raises(CheckpointError, match="convert the model to bfloat16"):
        writer.write("w", torch.tensor([1.0, 70_000.0]))


@pytest.mark.parametrize("verb", ["shrink", "plan"])
def test_a_hub_id_without_network_is_refused(
    dotexport: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = shrinking_of("nobody/no-such-model", text, tmp_path / "out", *NARROW)
    outcome = dotexport(*(arguments if verb == "shrink" else ["plan", arguments[1], *NARROW]))
    refused(outcome, 1, "nobody/no-such-model", "spelling and the network", "a local folder")


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such/folder", "a b/c"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(
    dotexport: Command, text: Path, tmp_path: Path, name: str
) -> None:
    outcome = dotexport(*shrinking_of(name, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, f"{name} is neither a folder nor a hub id", "expected a folder with")
