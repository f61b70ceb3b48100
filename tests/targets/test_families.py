"""Every class that is written, narrowed and run by every target that can hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.errors import RuntimeMissingError, SizeError
from dotexport.exports.exporting import export
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions

SQUARE = {"head_dim": None, "hidden_size": 64}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GEMMA = {"hidden_size": 80, "sliding_window": 512, "tie_word_embeddings": True}
KINDS = ["sliding_attention", "full_attention"]
MIXED = ["linear_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALL = ["onnx", "openvino", "ort-cpu", "gguf", "executorch", "mlx"]

# Name -> the original, the targets that are tried, and those of them that hold what is written.
MODELS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "window": (
        {"model_type": "mistral", "sliding_window": 16},
        ALL,
        ["executorch"],
    ),
    "phi3": (
        {"model_type": "phi3", **SQUARE, "sliding_window": None},
        ["onnx", "openvino", "ort-cpu", "mlx"],
        ["onnx", "openvino", "ort-cpu", "mlx"],
    ),
    "qwen2": (
        {"model_type": "qwen2", **SQUARE},
        ["ort-cpu", "gguf", "mlx"],
        ["ort-cpu", "gguf", "mlx"],
    ),
    "qwen3": ({"model_type": "qwen3"}, ["ort-cpu", "mlx"], ["ort-cpu", "mlx"]),
    "qwen3-yarn": (
        {"model_type": "qwen3", "rope_parameters": YARN},
        ALL,
        ["onnx", "openvino", "gguf", "executorch", "mlx"],
    ),
    "granite": (
        {"model_type": "granite", "residual_multiplier": 0.2, "attention_multiplier": 0.1},
        ALL,
        ["onnx", "openvino", "ort-cpu", "gguf", "executorch", "mlx"],
    ),
    # 80 wide, for 64 has a root without decimals; the context is what windows see.
    "gemma2": (
        {"model_type": "gemma2", **GEMMA},
        ALL,
        ["onnx", "openvino", "ort-cpu", "executorch", "mlx"],
    ),
    "gemma2-window": ({"model_type": "gemma2", "sliding_window": 16}, ALL, ["executorch"]),
    "gemma3": (
        {"model_type": "gemma3_text", "layer_types": KINDS, **GEMMA},
        ALL,
        ["onnx", "openvino", "executorch", "mlx"],
    ),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "layer_types": ["full_attention"] * 2,
            "num_kv_shared_layers": 1,
            **GEMMA,
        },
        [*ALL, "litert"],
        [],
    ),
    "smollm3": (
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        ["onnx", "ort-cpu", "gguf", "mlx"],
        ["onnx"],
    ),
    "ministral3": (
        {"model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
        ["onnx", "ort-cpu", "gguf", "mlx"],
        ["onnx"],
    ),
    "ernie": ({"model_type": "ernie4_5"}, ["ort-cpu", "gguf", "mlx"], ["ort-cpu", "gguf"]),
    "olmo2": ({"model_type": "olmo2"}, ALL, ["onnx", "openvino", "executorch", "mlx"]),
    "qwen3-moe": ({"model_type": "qwen3_moe", **EXPERTS}, ALL, ["onnx", "openvino", "executorch"]),
    "qwen3.5": (
        {"model_type": "qwen3_5_text", "layer_types": MIXED},
        ALL,
        [],
    ),
    "qwen3.5-moe": (
        {"model_type": "qwen3_5_moe_text", "layer_types": MIXED},
        ALL,
        [],
    ),
    "lfm2": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, ALL, []),
    "granite4-hybrid": (
        {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
        ALL,
        [],
    ),
    "granite4-moe": (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 40,
            **EXPERTS,
        },
        ALL,
        [],
    ),
    "granite-moe": (
        {"model_type": "granitemoe", **EXPERTS},
        ALL,
        ["onnx", "openvino", "executorch"],
    ),
    "granite4": (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
        },
        ["gguf"],
        ["gguf"],
    ),
    "gpt-oss": (
        {"model_type": "gpt_oss", "sliding_window": 16, **EXPERTS},
        ALL,
        ["executorch"],
    ),
    "gpt-oss-short": (
        {"model_type": "gpt_oss", "sliding_window": 512, "rope_parameters": PLAIN, **EXPERTS},
        ["onnx", "openvino", "ort-cpu"],
        ["onnx", "openvino"],
    ),
    "mixtral": ({"model_type": "mixtral", **EXPERTS}, ["onnx", "gguf", "onnx:int8"], ["onnx"]),
}

# Whose layers differ from each other; of others one says all, and tracing them is what takes long.
TWO_KINDS = (
    "gemma2",
    "gemma3",
    "gemma4",
    "smollm3",
    "gpt-oss",
    "qwen3.5",
    "qwen3.5-moe",
    "lfm2",
    "granite4",
    "granite4-hybrid",
    "granite4-moe",
)


# Of those, the ones that take long and that another one is much like.
HEAVY = (
    *("gemma2", "gemma3", "granite", "granite-moe", "gpt-oss", "gpt-oss-short"),
    *("phi3", "qwen2", "qwen3", "qwen3-yarn"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.heavy if n in HEAVY else ()) for n in MODELS]
)
def test_a_narrowed_family_computes_in_every_target_what_torch_computes(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path, translated_once: None
) -> None:
    changes, tried, expected = MODELS[name]
    width = 64 if "gemma" in name and "window" not in name else 40
    width = 48 if name in ("granite4-hybrid", "granite4-moe") else width  # which stays
    mixture = "num_local_experts" in changes or name == "qwen3.5-moe"
    inner = {"num_experts": 3} if mixture else {"intermediate_size": 64}
    model = tiny_model(num_hidden_layers=2 if name in TWO_KINDS else 1, **changes)
    letters = np.random.default_rng(0).integers(0, 87, size=2000)
    text = tmp_path / "letters.txt"
    text.write_text("".join(chr(33 + n) for n in letters))
    options = ShrinkOptions(
        text=TextOptions(source=str(text), samples=12, seqlen=64),
        sizes=SizeOptions(hidden_size=width, **inner),
        narrow=NarrowOptions(local=None),
    )
    out = shrink(model, tmp_path / "out", options, device="cpu").out
    made = []
    for target in ["hf", *tried]:
        try:
            made += [artifact.target for artifact in export(out, [target])]
        except SizeError:  # it said so before it wrote anything
            assert target not in expected
        except RuntimeMissingError:
            expected = [other for other in expected if other != target]
    # Nothing failed to agree with torch: that would have raised.
    assert sorted(made) == sorted(["hf", *expected])
