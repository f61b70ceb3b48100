"""Plans: published models from their numbers, rules that bind, and costs that files then have."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.errors import SizeError, UnsupportedModelError, UsageError
from dotexport.exports.exporting import export
from dotexport.models.checkpoint import read_config
from dotexport.models.text_options import TextOptions
from dotexport.sizes.budget import plan
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.effort import shrink_seconds
from dotexport.sizes.planning import BUDGET, choose
from dotexport.sizes.shrink_memory import shrink_memory


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

UNKNOWN_TO_BUILDER = ("gemma-3-1b", "OLMo-2-1B")


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
    builder = () if name in UNKNOWN_TO_BUILDER else ("ort-cpu:int4",)
    where = Deployment(targets=("hf", *builder, "onnx"))
    after = choose(published, SizeOptions(params="0.7x"), where).plan.after
    assert after.hidden_size % 8 == 0


# Heads divide over 8 devices, or over 2 only.
OVER = {"Llama-3.1-8B": 8, "Llama-3.1-70B": 8, "Qwen3-8B": 8, "Mistral-7B": 8, "Qwen2.5-7B": 2}


@pytest.mark.parametrize("name", OVER)
def test_devices_and_groups_divide_what_is_planned(name: str) -> None:
    devices = OVER[name]
    where = Deployment(tensor_parallel=devices, group=128)
    after = choose(PUBLISHED[name][0], SizeOptions(params="0.7x"), where).plan.after
    assert after.num_attention_heads % devices == 0
    assert after.num_key_value_heads % devices == 0 or devices % after.num_key_value_heads == 0
    assert after.intermediate_size % (128 * devices) == 0
    assert after.hidden_size % 128 == 0


@pytest.fixture
def only_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of one class: gguf, which takes more, as it would be."""
    ggml: Any = pytest.importorskip("dotexport.targets.ggml")
    monkeypatch.setattr(ggml, "ARCHITECTURES", dict(list(ggml.ARCHITECTURES.items())[:1]))


def test_a_target_of_one_class_alone_decides_the_carrier_and_is_named_as_binding(
    only_llama: None,
) -> None:
    published = PUBLISHED["Qwen2.5-7B"][0]
    asked = SizeOptions(params="0.7x", axes="hidden_size,intermediate_size,num_key_value_heads")
    free = choose(published, asked, Deployment())
    bound = choose(published, asked, Deployment(targets=("gguf:int4",)))
    assert free.plan.carrier.architecture == "GraniteForCausalLM"
    assert bound.plan.carrier.architecture == "LlamaForCausalLM"
    assert bound.plan.after.hidden_size % 28 == 0
    assert bound.binding == ["gguf-int4", BUDGET]
    # 448 x 7, on a grid of 64: on one of 128, 28 heads leave 2688 and the original's 3584, which
    # cut one axis or the other far more.
    assert bound.plan.after.hidden_size == 3136


def test_a_plan_for_vllm_knows_the_class_in_which_it_passes_over_head_dim() -> None:
    windowed = {
        **PUBLISHED["Qwen2.5-7B"][0],
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 14,
    }
    where, asked = Deployment(targets=("vllm",)), SizeOptions(hidden_size=3136)
    with pytest.raises(SizeError, match=r"28 heads of 128, and vLLM's .* passes over head_dim"):
        choose(windowed, asked, where)
    after = choose(windowed, SizeOptions(params="0.7x", square=True), where).plan.after
    assert after.hidden_size == after.spaces["query"]
    # Without a window it is written as Granite, which honours head_dim.
    assert choose(PUBLISHED["Qwen2.5-7B"][0], asked, where).plan.after.hidden_size == 3136


def test_a_plan_refuses_what_shrink_would_refuse() -> None:
    phi = config("phi3", 3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75, **TIED)
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor 0.75"):
        choose(phi, SizeOptions(params="0.7x"), Deployment())


def test_heads_that_do_not_divide_over_the_devices_are_refused() -> None:
    asked = SizeOptions(hidden_size=3328, intermediate_size=12672)
    with pytest.raises(SizeError, match="num_attention_heads 28 does not divide over 8 devices"):
        choose(PUBLISHED["Qwen2.5-7B"][0], asked, Deployment(tensor_parallel=8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_square_sizes_meet_the_budget_with_heads_that_leave(name: str) -> None:
    published = PUBLISHED[name][0]
    decided = plan(published, SizeOptions(params="0.7x", square=True))
    before, after = decided.before, decided.after
    assert after.hidden_size == after.num_attention_heads * after.head_dim
    queries = before.num_attention_heads // before.num_key_value_heads
    assert after.num_attention_heads == queries * after.num_key_value_heads
    # Where one KV head is a large step, the MLP takes what is left of the budget.
    assert 0.66 < decided.ratio <= 0.7


def test_a_plan_in_a_file_becomes_the_model_that_it_describes(tmp_path: Path) -> None:
    """Printed, written to a file, shrunk from: what lies in hf/ has the planned sizes."""
    file, out = tmp_path / "plan.json", tmp_path / "out"
    asked = ["plan", str(MODEL_DIR), "--params", "0.7x", "--target", "ort-cpu:int4", "--json"]
    file.write_text(CliRunner().invoke(app, asked).stdout)
    planned = json.loads(file.read_text())
    text = ["--calib", "embedded:calibration", "--samples", "4", "--seqlen", "64"]
    shrink = ["shrink", str(MODEL_DIR), "-o", str(out), "--plan", str(file), *text]
    done = CliRunner().invoke(app, [*shrink, "--device", "cpu"])
    assert done.exit_code == 0, done.exception
    written = read_config(out / "hf")
    for size in ("hidden_size", "intermediate_size", "num_key_value_heads"):
        assert written[size] == planned[size][1] <= planned[size][0]
    model = LlamaForCausalLM.from_pretrained(out / "hf")
    assert model.num_parameters() == planned["parameters"][1] < planned["parameters"][0]


@pytest.mark.parametrize("hidden", [pytest.param(256, marks=pytest.mark.heavy), 384])
def test_the_estimated_time_of_shrink_is_near_what_it_takes(hidden: int, tmp_path: Path) -> None:
    """On the embedded model, and on one of another width and depth with random weights."""
    folder = MODEL_DIR
    if hidden != 256:
        sizes = {"hidden_size": hidden, "intermediate_size": 640, "num_hidden_layers": 2}
        folder = tmp_path / "model"
        torch.manual_seed(0)
        settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096}
        LlamaForCausalLM(LlamaConfig(**sizes, **settings)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    decided = plan(read_config(folder), SizeOptions(params="0.7x"))
    estimate = shrink_seconds(decided, samples=8, seqlen=128)
    options = ShrinkOptions(
        sizes=SizeOptions(params="0.7x"),
        text=TextOptions(source="embedded:calibration", samples=8, seqlen=128),
        allocate="rule",  # measuring cuts is estimated by itself
    )
    # At work, not waiting: other processes are no part of either. Both with as many threads.
    started = time.process_time()
    shrink(folder, tmp_path / "out", options, device="cpu")
    spent = (time.process_time() - started) / torch.get_num_threads()
    # Twice is what the docs promise; fixed costs (files, imports) are a second of so short a run.
    assert estimate / 2 < spent < 2 * estimate + 2


def test_what_no_sizes_satisfy_is_refused_with_every_reason(only_llama: None) -> None:
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
    specs = ("hf", "gguf:fp16", "ort-cpu:fp32")
    asked = SizeOptions(intermediate_size=88)
    stored = json.loads((folder / "config.json").read_text())
    planned = choose(stored, asked, Deployment(targets=specs)).costs.artifacts
    for artifact in export(folder, specs, out=tmp_path / "out", verify=False):
        weights = max(entry["bytes"] for entry in artifact.files.values())
        wanted = planned[artifact.name][1]
        # Besides weights: rotary tables of 512 positions, names and tokens.
        assert wanted <= weights <= wanted + 90_000


@pytest.mark.parametrize(
    ("spec", "extra", "tied"),
    [
        ("ort-cpu:int4", "onnxruntime_genai", True),
        ("ort-cpu:int4", "onnxruntime_genai", False),
        pytest.param("ort-cuda:int4", "onnxruntime_genai", True, marks=pytest.mark.heavy),
        ("onnx:int8", "onnxscript", True),
        ("onnx:int8", "onnxscript", False),
        ("openvino:int8", "openvino", True),
        ("openvino:int4", "openvino", False),
        pytest.param("executorch:int4", "executorch", True, marks=pytest.mark.heavy),
        pytest.param("executorch:int4", "executorch", False, marks=pytest.mark.heavy),
        ("gguf:int4", "gguf", True),
    ],
)
def test_planned_bytes_know_how_a_table_is_stored(
    spec: str, extra: str, tied: bool, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """One that is most of the model, and shared with the head or not."""
    pytest.importorskip(extra)
    folder = tiny_llama("many-tied-rows" if tied else "many-rows")
    config = json.loads((folder / "config.json").read_text())
    planned = choose(config, SizeOptions(intermediate_size=96), Deployment(targets=(spec,)))
    wanted, _ = planned.costs.artifacts[spec.replace(":", "-")]
    [artifact] = export(folder, [spec], out=tmp_path / "out", verify=False)[-1:]
    stored = sum(entry["bytes"] for entry in artifact.files.values())
    # Besides weights: graph, rotary tables of 512 positions, names, the tokenizer.
    assert wanted <= stored <= 1.05 * wanted + 400_000


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
    file = Path(__file__).resolve().parents[2] / "docs/results/memory.json"
    measured = config("llama", 512, 1280, 6, 8, 4, 4096, head_dim=64)
    decided = choose(measured, SizeOptions(params="0.7x"), Deployment()).plan
    estimate = shrink_memory(measured, decided, samples=32, seqlen=256) / 1e6
    for row in json.loads(file.read_text())["rows"]:
        # Allocators keep what was freed, and layers of any number share one place.
        assert estimate == pytest.approx(row["peak, MB"], rel=0.15)
