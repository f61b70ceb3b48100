"""Every family: counted as torch counts, carried exactly, narrowed, loaded and generating."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.carrying import carry
from dotexport.axes.plan import SizeOptions
from dotexport.errors import UnsupportedModelError
from dotexport.healing import distil_head
from dotexport.healing.distil_loss import read
from dotexport.healing.heal_options import HealOptions
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, read_config
from dotexport.models.config_words import check_release
from dotexport.models.families import SUPPORTED, find_family
from dotexport.models.families.ministral import MINISTRAL3
from dotexport.models.loading import capped_attention
from dotexport.models.rope import stock_config
from dotexport.models.shapes import num_parameters, read_sizes
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.judging import Head
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.sizes.budget import plan

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
SQUARE = {"head_dim": None, "hidden_size": 64, "num_attention_heads": 4}
QWEN2 = SQUARE | {"model_type": "qwen2"}
WINDOW = 16  # shorter than every text below, so that it matters
# Windows in some layers only, scores of a scale of their own, caps where the class has them.
GEMMA = {"tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}

# Gates sum to 1 in one of its models, and not in the other.
EXPERTS = {"moe_intermediate_size": 88, "num_experts_per_tok": 2}

# Name -> what differs from conftest.BASE, and the class that is written at hidden 40.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama3-rope": ({"model_type": "llama", "rope_parameters": LLAMA3}, "LlamaForCausalLM"),
    "mistral": (
        {"model_type": "mistral", "sliding_window": None, "rope_parameters": YARN},
        "MistralForCausalLM",
    ),
    "mistral-window": (
        {"model_type": "mistral", "sliding_window": WINDOW, "tie_word_embeddings": True},
        "MistralForCausalLM",
    ),
    "qwen2": (QWEN2 | {"rope_parameters": YARN}, "LlamaForCausalLM"),
    "qwen2-tied": (QWEN2 | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "qwen2-odd": (QWEN2 | {"hidden_size": 72, "num_attention_heads": 6}, "GraniteForCausalLM"),
    "qwen2-window": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "Qwen2ForCausalLM",
    ),
    "qwen3": (
        {"model_type": "qwen3", "rope_parameters": YARN, "tie_word_embeddings": True},
        "Qwen3ForCausalLM",
    ),
    "qwen3-window": (
        {
            "model_type": "qwen3",
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        "Qwen3ForCausalLM",
    ),
    "granite": (
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
        "GraniteForCausalLM",
    ),
    "granite-tied": (
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        "GraniteForCausalLM",
    ),
    "granite4": (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
            "intermediate_size": 512,  # of experts, of which there are none
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        "GraniteForCausalLM",
    ),
    "granite4-hybrid": (
        {
            "model_type": "granitemoehybrid",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 5.0,
            "attention_bias": True,
        },
        "GraniteMoeHybridForCausalLM",
    ),
    "granite-moe": (
        {
            "model_type": "granitemoe",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        "GraniteMoeForCausalLM",
    ),
    "granite4-moe": (
        {
            "model_type": "granitemoehybrid",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 56,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 5.0,
        },
        "GraniteMoeHybridForCausalLM",
    ),
    "phi3": (SQUARE | {"model_type": "phi3", "tie_word_embeddings": True}, "MistralForCausalLM"),
    "phi3-window": (
        SQUARE | {"model_type": "phi3", "sliding_window": WINDOW},
        "MistralForCausalLM",
    ),
    "gemma2": (GEMMA | {"model_type": "gemma2"}, "Gemma2ForCausalLM"),
    "gemma2-untied": (
        {"model_type": "gemma2", "attention_bias": True, "rope_parameters": LLAMA3},
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        GEMMA
        | {
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "Gemma3ForCausalLM",
    ),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "tie_word_embeddings": True,
            "final_logit_softcapping": 5.0,
        },
        "Gemma4ForCausalLM",
    ),
    "gemma4-untied": (
        {
            "model_type": "gemma4_text",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "attention_bias": True,
        },
        "Gemma4ForCausalLM",
    ),
    "olmo2": ({"model_type": "olmo2", "rope_parameters": YARN}, "Olmo2ForCausalLM"),
    "olmo2-tied": (
        SQUARE | {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
        "Olmo2ForCausalLM",
    ),
    "smollm3": (
        {
            "model_type": "smollm3",
            "no_rope_layers": [1, 0, 1, 1],  # one more than layers
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
        "SmolLM3ForCausalLM",
    ),
    "ministral": (
        {
            "model_type": "ministral",
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "MinistralForCausalLM",
    ),
    "ministral3": (
        {"model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
        "Ministral3ForCausalLM",
    ),
    "seed-oss": (
        {"model_type": "seed_oss", "attention_bias": True, "rope_parameters": LLAMA3},
        "LlamaForCausalLM",
    ),
    "ernie": ({"model_type": "ernie4_5", "use_bias": True}, "Ernie4_5ForCausalLM"),
    "hunyuan": (
        {"model_type": "hunyuan_v1_dense", "tie_word_embeddings": True},
        "HunYuanDenseV1ForCausalLM",
    ),
    "qwen3-moe": (
        EXPERTS | {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True},
        "Qwen3MoeForCausalLM",
    ),
    "qwen3-moe-tied": (
        EXPERTS
        | {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        "Qwen3MoeForCausalLM",
    ),
    "qwen3.5": (
        {"model_type": "qwen3_5_text"},
        "Qwen3_5ForCausalLM",
    ),
    "qwen3.5-tied": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        "Qwen3_5ForCausalLM",
    ),
    "qwen3.5-moe": (
        EXPERTS | {"model_type": "qwen3_5_moe_text"},
        "Qwen3_5MoeForCausalLM",
    ),
    "qwen3.5-moe-tied": (
        EXPERTS
        | {
            "model_type": "qwen3_5_moe_text",
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 56,
            "tie_word_embeddings": True,
        },
        "Qwen3_5MoeForCausalLM",
    ),
    "lfm2": (
        {"model_type": "lfm2", "intermediate_size": 132},
        "Lfm2ForCausalLM",
    ),
    "lfm2-untied": (
        {
            "model_type": "lfm2",
            "layer_types": ["full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
        "Lfm2ForCausalLM",
    ),
    "mixtral": (
        {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
        },
        "MixtralForCausalLM",
    ),
    "gpt-oss": (
        {
            "model_type": "gpt_oss",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": YARN,
        },
        "GptOssForCausalLM",
    ),
    "gpt-oss-tied": (
        {
            "model_type": "gpt_oss",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
        "GptOssForCausalLM",
    ),
}
if transformers.__version__.startswith("4."):
    MODELS["olmo2"] = ({"model_type": "olmo2"}, "Olmo2ForCausalLM")  # its class takes no YaRN there
    del MODELS["ministral3"]  # of release 5
TOKENS_BL = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))

Tiny = Callable[[str], Path]


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> Tiny:
    """Name in MODELS -> its folder."""
    return lambda name: tiny_model(**MODELS[name][0])


def inner(name: str, size: int) -> dict[str, int]:
    """The axis of the MLP, or of each expert."""
    moe = "moe_intermediate_size"
    return {moe if moe in MODELS[name][0] else "intermediate_size": size}


def staying(name: str) -> set[str]:
    """Axes along which nothing leaves, of the class that is written."""
    return {axis for axis, _ in SUPPORTED[MODELS[name][1]].stays}


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        **capped_attention(read_config(folder)),
    )
    assert not any(report.values())
    return model


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load(folder)(input_ids=TOKENS_BL).logits
    return found


def text_beside(folder: Path) -> TextOptions:
    rng = np.random.default_rng(0)
    file = folder / "letters.txt"
    file.write_text("".join(chr(33 + n) for n in rng.integers(0, 87, size=2000)))
    return TextOptions(source=str(file), samples=12, seqlen=64)


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    writer = CheckpointWriter(folder, checkpoint.specs)
    for name in checkpoint.specs:
        writer.write(name, checkpoint.tensor(name))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_shapes_are_those_of_torch(name: str, tiny: Tiny) -> None:
    source = open_source(tiny(name))
    assert len(set(source.files.values())) > 1
    sizes = read_sizes(find_family(source.config), source.config)
    assert num_parameters(find_family(source.config), sizes) == source.num_parameters


@pytest.mark.parametrize("name", MODELS)
def test_a_re_badged_model_computes_the_same(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source = open_source(tiny(name))
    sizes = SizeOptions(sizes=inner(name, 88))
    carried, decided = carry(source, plan(source.config, sizes))
    assert carried.config["architectures"] == [decided.family.architecture]
    before, after = logits(tiny(name)), logits(written(carried, tmp_path / "carried"))
    # Granite's multipliers round each weight once, and products with a part of a matrix sum in
    # another order; everything else is the same sum of the same numbers, and zeros add nothing.
    exact = not name.startswith(("granite", "phi3"))
    tolerance = 0.0 if exact else 1e-5 * float(before.abs().max())
    assert (before - after).abs().max() <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_a_head_are_the_logits(name: str, tiny: Tiny) -> None:
    """With whatever divides or caps them in a class, as the classes themselves have it."""
    model = load(tiny(name))
    head = distil_head.Head.of(model)
    assert (head.cap is not None) == (name.startswith("gemma2") or name == "gemma4")
    assert (head.scaling != 1) == name.startswith("granite")
    with torch.inference_mode():
        found = head.logits(read(model, TOKENS_BL, streams=False)[0])
        expected = model(input_ids=TOKENS_BL).logits.flatten(0, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_full_width_in_any_basis_that_it_has_is_the_original(
    name: str, refit: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Any rotation; or any order of its axes with any signs, where a stream cannot be rotated."""
    source = open_source(tiny(name))
    same = plan(source.config, SizeOptions(sizes=inner(name, 88)))
    rotates = same.family.rotates
    untied = replace(same, after=replace(same.after, tied=same.before.tied and not rotates))
    (tmp_path / "hf").mkdir()
    windows_NL = token_windows(source.folder, text_beside(tmp_path))
    run = prepare(
        *(source, untied, tmp_path, CalibrationText(windows_NL)),
        NarrowOptions(refit=refit, local=None),
    )
    width = same.before.hidden_size
    rng = np.random.default_rng(0)
    basis_DD = np.linalg.qr(rng.normal(size=(width, width)))[0]
    if not rotates:
        basis_DD = rng.choice([-1.0, 1.0], size=width) * np.eye(width)[rng.permutation(width)]
    run.run(Basis(basis_DD, "random", 1.0))
    run.writer.finish()
    original, rotated = logits(source.folder), logits(tmp_path / "hf")
    # 1e-4 of the largest logit: float32 through three layers in other coordinates.
    tolerance = 1e-4 * max(1.0, float(original.abs().max()))
    assert (original - rotated).abs().max() < tolerance
    assert abs(run.divergence) < 1e-6
    # Layers run one by one, with masks and rotary embeddings made for them, are the whole model.
    stream_BLD = run.streams.original_NLD[:2]
    with torch.inference_mode():
        piecewise_BLV = Head(run.original.stock, run.original.folded_head()).logits(stream_BLD)
        whole_BLV = load(source.folder)(input_ids=windows_NL[:2]).logits
    assert (piecewise_BLV - whole_BLV).abs().max() < tolerance


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "num_hidden_layers" not in staying(name)]
)
def test_fewer_layers_are_those_of_the_original_that_stay(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    """With nothing repaired: windows, kinds of attention and carriers go with their layer."""
    source = open_source(tiny(name))
    options = ShrinkOptions(
        text=text_beside(tmp_path),
        sizes=SizeOptions(num_hidden_layers=2),
        narrow=NarrowOptions(refit=False),
    )
    kept = shrink(source.folder, tmp_path / "out", options).plan.kept_layers
    original = load(source.folder)
    original.model.layers = torch.nn.ModuleList(original.model.layers[layer] for layer in kept)
    for place, layer in enumerate(original.model.layers):
        mixers = ("self_attn", "linear_attn", "conv", "mamba")
        next(filter(None, (getattr(layer, one, None) for one in mixers))).layer_idx = place
    original.config.num_hidden_layers = len(kept)
    if getattr(original.config, "layer_types", None):
        original.config.layer_types = [original.config.layer_types[layer] for layer in kept]
    with torch.inference_mode():
        wanted_BLV = original(input_ids=TOKENS_BL, use_cache=False).logits
    # As for the whole model above.
    tolerance = 1e-4 * max(1.0, float(wanted_BLV.abs().max()))
    assert (logits(tmp_path / "out/hf") - wanted_BLV).abs().max() < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_a_narrowed_model_is_stock_loads_and_generates(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    experts = {"num_experts": 3} if "num_experts_per_tok" in MODELS[name][0] else {}
    hidden = 48 if "hidden_size" in staying(name) else 40
    groups = 2 if "num_key_value_heads" in staying(name) else 1
    options = ShrinkOptions(
        text=text_beside(tmp_path),
        sizes=SizeOptions(
            hidden_size=hidden, num_key_value_heads=groups, sizes=inner(name, 64) | experts
        ),
        narrow=NarrowOptions(local=None),
        max_shard_bytes=40_000,
    )
    source = open_source(tiny(name))
    shrunk = shrink(source.folder, tmp_path / "out", options, device="cpu")
    assert len(list((tmp_path / "out" / "hf").glob("model-*.safetensors"))) > 1
    narrowed = load(tmp_path / "out" / "hf")
    family, architecture = find_family(source.config), MODELS[name][1]
    assert type(narrowed).__name__ == architecture
    assert shrunk.plan.architectures == [family.architecture, architecture]
    manifest = json.loads((tmp_path / "out" / "dotexport.json").read_text())
    assert manifest["architecture"] == shrunk.plan.architectures
    config = narrowed.config
    [width] = inner(name, 64)
    assert (config.hidden_size, getattr(config, width), config.num_key_value_heads) == (
        hidden,
        64,
        groups,
    )
    assert not experts or config.num_experts == 3
    parameters = {p.data_ptr(): p.numel() for p in narrowed.parameters()}
    assert sum(parameters.values()) == shrunk.plan.parameters_after
    tied = read_sizes(family, source.config).tied  # a default need not be said
    assert (narrowed.lm_head.weight is narrowed.model.embed_tokens.weight) == tied
    # Greedy decoding with the cache picks what one pass over the whole text would.
    tokens_BL = narrowed.generate(TOKENS_BL[:, :20], max_new_tokens=12, do_sample=False)
    with torch.inference_mode():
        best_BL = narrowed(input_ids=tokens_BL).logits.argmax(-1)
    first, length = tokens_BL[0].tolist(), tokens_BL.shape[1]
    end = first.index(2, 20) + 1 if 2 in first[20:] else length
    assert first[20:end] == best_BL[0, 19 : end - 1].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        "qwen2",
        "qwen3",
        "granite",
        "phi3",
        "gemma2",
        "gemma3",
        "olmo2",
        "qwen3-moe",
        "qwen3.5",
        "gpt-oss",
        "granite-moe",
    ],
)
def test_a_narrowed_family_learns_from_its_original(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """One window is learnt from again and again: random letters have nothing else in common."""
    kinds = ["linear_attention", "full_attention"] if name == "qwen3.5" else None
    layers = {"num_hidden_layers": 2 if kinds else 1, "layer_types": kinds}
    changes = MODELS[name][0] | layers
    made = shrink(
        tiny_model(**changes),
        tmp_path / "out",
        ShrinkOptions(
            text=replace(text_beside(tmp_path), samples=2),
            sizes=SizeOptions(hidden_size=40),
            narrow=NarrowOptions(local=None),
            heal=HealOptions(steps=12, every=4, batch=1, precision="fp32"),
        ),
        device="cpu",
    )
    assert made.healing is not None
    losses = [point["loss"] for point in made.healing["curve"][1:]]
    assert losses[-1] < losses[0]
    load(made.out / "hf")


def test_what_has_no_table_is_refused_with_the_list_of_what_has() -> None:
    config = {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM is not supported") as caught:
        find_family(config)
    assert all(architecture in str(caught.value) for architecture in SUPPORTED)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("kind", "class_"),
    [
        ("olmoe", "OlmoeForCausalLM"),
        ("qwen3_next", "Qwen3NextForCausalLM"),
        ("olmo3", "Olmo3ForCausalLM"),
    ],
)
def test_models_of_other_layers_are_named_before_anything_is_read(kind: str, class_: str) -> None:
    config = stock_config({"model_type": kind}).to_dict() | {"architectures": [class_]}
    said = rf"{class_} is not supported \(model_type {kind}\)"
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        find_family(config)
    dense = kind == "olmo3"
    assert ("mixture of experts" in str(caught.value)) == (not dense)
    assert caught.value.exit_code == 5


def test_a_class_that_this_transformers_lacks_is_refused_with_the_release_to_take() -> None:
    younger = replace(MINISTRAL3, model_type="of_tomorrow")
    with pytest.raises(UnsupportedModelError, match="Ministral3ForCausalLM is unknown to this"):
        check_release(younger)


def test_a_model_of_more_than_text_is_told_how_its_text_part_can_be_narrowed() -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text"},
    }
    with pytest.raises(UnsupportedModelError, match="save its language model") as caught:
        find_family(config)
    assert "Gemma3ForCausalLM" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_decoder_that_sees_later_tokens_is_refused(tiny: Tiny) -> None:
    config = {**open_source(tiny("gemma3")).config, "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention") as caught:
        find_family(config)
    assert caught.value.exit_code == 5
