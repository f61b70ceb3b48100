"""Plans: published models from their numbers, rules that bind, and costs that files then have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dotexport.cli import app
from dotexport.errors import SizeError, UsageError
from dotexport.exporting import export
from dotexport.planning import BUDGET, Deployment, choose, shrink_memory
from dotexport.sizing import SizeOptions


def config(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        **more,
    }


GEMMA = {"sliding_window": 512, "max_position_embeddings": 512}
TIED = {"tie_word_embeddings": True}

# The numbers of the published config.json; parameters; bytes of the KV cache per token in bfloat16.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama-3.1-8B": (config("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248, 131_072),
    "Llama-3.1-70B": (config("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496, 327_680),
    "Llama-3.2-1B": (config("llama", 2048, 8192, 16, 32, 8, 128256, **TIED), 1_235_814_400, 32_768),
    "Llama-3.2-3B": (
        config("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED),
        3_212_749_824,
        114_688,
    ),
    "Qwen2.5-0.5B": (config("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED), 494_032_768, 12_288),
    "Qwen2.5-7B": (config("qwen2", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512, 57_344),
    "Qwen3-8B": (
        config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
        8_190_735_360,
        147_456,
    ),
    "Mistral-7B": (
        config("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
        7_241_732_096,
        131_072,
    ),
    "SmolLM2-135M": (config("llama", 576, 1536, 30, 9, 3, 49152, **TIED), 134_515_008, 23_040),
    "Phi-3-mini-4k": (
        config("phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=None, pad_token_id=32000),
        3_821_079_552,
        393_216,
    ),
    # Windows of published Gemmas are shorter than their contexts, which graphs do not hold.
    "gemma-2-2b": (
        config("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, **GEMMA, **TIED),
        2_614_341_888,
        106_496,
    ),
    "gemma-3-1b": (
        config(
            "gemma3_text",
            1152,
            6912,
            26,
            4,
            1,
            262144,
            architectures=["Gemma3ForCausalLM"],
            head_dim=256,
            **GEMMA,
            **TIED,
        ),
        999_885_952,
        26_624,
    ),
    "OLMo-2-1B": (config("olmo2", 2048, 8192, 16, 16, 16, 100352), 1_484_916_736, 131_072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_and_planned_from_their_config(name: str) -> None:
    published, parameters, cache = PUBLISHED[name]
    chosen = choose(published, SizeOptions(params="0.7x"), Deployment())
    assert chosen.plan.parameters_before == parameters
    assert chosen.costs.cache_per_token["hf"][0] == cache
    assert chosen.costs.artifacts["hf"] == (2 * parameters, 2 * chosen.plan.parameters_after)
    # One step of the grid is a few per cent of the smallest of these.
    assert 0.62 < chosen.plan.ratio <= 0.7
    assert chosen.binding == [BUDGET]


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_named_targets_take_what_is_planned(name: str) -> None:
    published, _, _ = PUBLISHED[name]
    where = Deployment(targets=("hf", "ort-cpu:int4", "onnx"))
    after = choose(published, SizeOptions(params="0.7x"), where).plan.after
    assert after.hidden_size % 8 == 0


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen2.5-7B", "Qwen3-8B"])
def test_devices_and_groups_divide_what_is_planned(name: str, devices: int) -> None:
    where = Deployment(tensor_parallel=devices, group=128)
    after = choose(PUBLISHED[name][0], SizeOptions(params="0.7x"), where).plan.after
    assert after.num_attention_heads % devices == 0
    assert after.num_key_value_heads % devices == 0 or devices % after.num_key_value_heads == 0
    assert after.intermediate_size % (128 * devices) == 0
    assert after.hidden_size % 128 == 0


def test_a_target_of_one_class_alone_decides_the_carrier_and_is_named_as_binding() -> None:
    published = PUBLISHED["Qwen2.5-7B"][0]
    free = choose(published, SizeOptions(params="0.7x"), Deployment())
    bound = choose(published, SizeOptions(params="0.7x"), Deployment(targets=("gguf:int4",)))
    assert free.plan.carrier.architecture == "GraniteForCausalLM"
    assert bound.plan.carrier.architecture == "LlamaForCausalLM"
    assert bound.plan.after.hidden_size % 28 == 0
    assert bound.binding == ["gguf-int4", BUDGET]


def test_what_no_sizes_satisfy_is_refused_with_every_reason() -> None:
    where = Deployment(targets=("gguf",), tensor_parallel=7)
    asked = SizeOptions(params="0.7x", num_key_value_heads=8, intermediate_size=8192)
    with pytest.raises(SizeError) as caught:
        choose(PUBLISHED["Qwen3-8B"][0], asked, where)
    text = str(caught.value)
    assert "Qwen3ForCausalLM is not written to GGUF" in text
    assert "num_attention_heads" in text
    assert "over 7 devices" in text


def test_explicit_sizes_are_held_to_the_rules_too() -> None:
    asked = SizeOptions(hidden_size=3968, intermediate_size=14328)
    published = PUBLISHED["Llama-3.1-8B"][0]
    assert choose(published, asked, Deployment()).plan.after.intermediate_size == 14328
    with pytest.raises(SizeError, match="intermediate_size 14328 is no multiple of 128"):
        choose(published, asked, Deployment(group=128))
    with pytest.raises(UsageError, match="at least 1"):
        Deployment(group=0)


@pytest.mark.parametrize("model", ["wide-heads", "tied-bf16", "biased"])
def test_planned_bytes_are_those_of_the_artifacts(
    model: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of what ort-cpu and gguf write; their own suites hold onnx and openvino to the same."""
    pytest.importorskip("gguf")
    folder = tiny_llama(model)
    specs = ("gguf:fp16", "ort-cpu:fp32")
    asked = SizeOptions(intermediate_size=88)
    stored = json.loads((folder / "config.json").read_text())
    planned = choose(stored, asked, Deployment(targets=specs)).costs.artifacts
    for artifact in export(folder, specs, out=tmp_path / "out", verify=False):
        weights = max(entry["bytes"] for entry in artifact.files.values())
        wanted = planned[artifact.name][1]
        # Besides weights: rotary tables of 512 positions, names and tokens.
        assert wanted <= weights <= wanted + 90_000


def test_the_verb_shows_costs_and_refuses_with_code_5(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["SmolLM2-135M"][0]))
    arguments = ["plan", str(tmp_path), "--params", "0.7x", "--target", "gguf:int8"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "KV cache per token" in shown.stdout
    # What it says to give to shrink is what it chose.
    flags = shown.stdout.partition("shrink to them with ")[2].splitlines()[0].split()
    again = CliRunner().invoke(app, ["plan", str(tmp_path), *flags, "--json"])
    told = CliRunner().invoke(app, [*arguments, "--json"])
    document = json.loads(told.stdout)
    assert json.loads(again.stdout)["parameters"] == document["parameters"]
    assert {"hf", "gguf-int8"} == set(document["artifact_bytes"])
    assert document["parameters"][0] == 134_515_008
    assert document["shrink_memory_bytes"] > document["disk_bytes"]
    refused = CliRunner().invoke(app, [*arguments, "--tensor-parallel", "7"])
    assert isinstance(refused.exception, SizeError)
    assert refused.exception.exit_code == 5


def test_the_estimated_memory_of_shrink_is_near_what_was_measured() -> None:
    """docs/results/memory.json: hidden 512, MLP 1280, 32 windows of 256 tokens."""
    file = Path(__file__).resolve().parents[1] / "docs/results/memory.json"
    measured = config("llama", 512, 1280, 6, 8, 4, 4096, head_dim=64)
    decided = choose(measured, SizeOptions(params="0.7x"), Deployment()).plan
    estimate = shrink_memory(measured, decided, samples=32, seqlen=256) / 1e6
    for row in json.loads(file.read_text())["rows"]:
        # Allocators keep what was freed, and layers of any number share one place.
        assert estimate == pytest.approx(row["peak, MB"], rel=0.15)
