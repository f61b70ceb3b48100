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
from transformers import AutoModelForCausalLM

from dotexport.basis import Basis
from dotexport.calibrate import TextOptions, token_windows
from dotexport.carriers import carry
from dotexport.checkpoint import Checkpoint, CheckpointWriter
from dotexport.errors import UnsupportedModelError
from dotexport.families import find_family, num_parameters, read_sizes, supported
from dotexport.prepare import prepare
from dotexport.shrinking import ShrinkOptions, open_source, shrink
from dotexport.site import NarrowOptions
from dotexport.sizing import SizeOptions, plan

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

# Name -> what differs from conftest.BASE, and the class that is written at hidden 40.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama3-rope": ({"model_type": "llama", "rope_parameters": LLAMA3}, "LlamaForCausalLM"),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, "MistralForCausalLM"),
    "mistral-window": ({"model_type": "mistral", "sliding_window": WINDOW}, "MistralForCausalLM"),
    "qwen2": (QWEN2 | {"rope_parameters": YARN}, "LlamaForCausalLM"),
    "qwen2-tied": (QWEN2 | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "qwen2-odd": (QWEN2 | {"hidden_size": 72, "num_attention_heads": 6}, "GraniteForCausalLM"),
    "qwen2-window": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "Qwen2ForCausalLM",
    ),
    "qwen3": ({"model_type": "qwen3", "rope_parameters": YARN}, "Qwen3ForCausalLM"),
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
    "phi3": (SQUARE | {"model_type": "phi3"}, "MistralForCausalLM"),
    "phi3-window": (
        SQUARE | {"model_type": "phi3", "sliding_window": WINDOW},
        "MistralForCausalLM",
    ),
}
TOKENS_BL = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))

Tiny = Callable[[str], Path]


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> Tiny:
    """Name in MODELS -> its folder."""
    return lambda name: tiny_model(**MODELS[name][0])


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
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
    sizes = SizeOptions(intermediate_size=88)
    carried, decided = carry(source, plan(source.config, sizes))
    assert carried.config["architectures"] == [decided.family.architecture]
    before, after = logits(tiny(name)), logits(written(carried, tmp_path / "carried"))
    # Granite's multipliers round each weight once, and products with a part of a matrix sum in
    # another order; everything else is the same sum of the same numbers, and zeros add nothing.
    exact = not name.startswith(("granite", "phi3"))
    tolerance = 0.0 if exact else 1e-5 * float(before.abs().max())
    assert (before - after).abs().max() <= tolerance


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_full_width_in_any_rotation_is_the_original(
    name: str, refit: bool, tiny: Tiny, tmp_path: Path
) -> None:
    source = open_source(tiny(name))
    same = plan(source.config, SizeOptions(intermediate_size=88))
    untied = replace(same, after=replace(same.after, tied=False))
    (tmp_path / "hf").mkdir()
    windows_NL = token_windows(source.folder, text_beside(tmp_path))
    run = prepare(source, untied, tmp_path, windows_NL, NarrowOptions(refit=refit, local=None))
    width = same.before.hidden_size
    rotation_DD = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    run.run(Basis(rotation_DD, "random rotation", 1.0))
    run.writer.finish()
    original, rotated = logits(source.folder), logits(tmp_path / "hf")
    # 1e-4 of the largest logit: float32 through three layers in other coordinates.
    assert (original - rotated).abs().max() < 1e-4 * max(1.0, float(original.abs().max()))
    assert abs(run.divergence) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_narrowed_model_is_stock_loads_and_generates(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    options = ShrinkOptions(
        text=text_beside(tmp_path),
        sizes=SizeOptions(hidden_size=40, intermediate_size=64, num_key_value_heads=1),
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
    assert (config.hidden_size, config.intermediate_size, config.num_key_value_heads) == (40, 64, 1)
    parameters = {p.data_ptr(): p.numel() for p in narrowed.parameters()}
    assert sum(parameters.values()) == shrunk.plan.parameters_after
    tied = bool(source.config.get("tie_word_embeddings"))
    assert (narrowed.lm_head.weight is narrowed.model.embed_tokens.weight) == tied
    # Greedy decoding with the cache picks what one pass over the whole text would.
    tokens_BL = narrowed.generate(TOKENS_BL[:, :20], max_new_tokens=12, do_sample=False)
    with torch.inference_mode():
        best_BL = narrowed(input_ids=tokens_BL).logits.argmax(-1)
    first, length = tokens_BL[0].tolist(), tokens_BL.shape[1]
    end = first.index(2, 20) + 1 if 2 in first[20:] else length
    assert first[20:end] == best_BL[0, 19 : end - 1].tolist()


def test_what_has_no_table_is_refused_with_the_list_of_what_has() -> None:
    config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM is not supported") as caught:
        find_family(config)
    assert all(architecture in str(caught.value) for architecture in supported())
    assert caught.value.exit_code == 5


def test_heads_that_are_rotated_in_part_are_refused(tiny: Tiny) -> None:
    source = open_source(tiny("phi3"))
    rope = source.config.get("rope_parameters", {}) | {"partial_rotary_factor": 0.75}
    config = {**source.config, "rope_parameters": rope}
    decided = plan(config, SizeOptions(intermediate_size=64))
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor 0\.75"):
        carry(replace(source, config=config), decided)
