"""The embedded model as another class: real text behaviour for every class that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dotexport import ShrinkOptions, SizeOptions, shrink
from dotexport.calibrate import TextOptions
from dotexport.embedded import MODEL_DIR
from dotexport.site import NarrowOptions

TEXT = TextOptions(source="embedded:calibration", samples=16, seqlen=256)
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
Tensors = dict[str, torch.Tensor]

# Name -> the class of the original, what it is narrowed to, and the class that comes out.
NARROWED: dict[str, tuple[str, dict[str, int], str]] = {
    "llama": ("llama", {"hidden_size": 192, "intermediate_size": 384}, "LlamaForCausalLM"),
    "biased": ("qwen2", {"hidden_size": 192, "intermediate_size": 384}, "LlamaForCausalLM"),
    # Six heads, which 200 does not divide by.
    "odd": ("qwen2", {"hidden_size": 200, "num_key_value_heads": 3}, "GraniteForCausalLM"),
    "mistral": ("mistral", {"hidden_size": 200, "num_key_value_heads": 3}, "MistralForCausalLM"),
    "phi3": ("phi3", {"hidden_size": 192, "intermediate_size": 384}, "MistralForCausalLM"),
    "granite": ("granite", {"hidden_size": 192, "intermediate_size": 384}, "GraniteForCausalLM"),
    "qwen3": ("qwen3", {"hidden_size": 192, "intermediate_size": 384}, "Qwen3ForCausalLM"),
}


def write_badged(folder: Path, kind: str) -> Path:
    """The embedded Llama as a model of another class: exactly, but for Qwen3's norms of heads."""
    folder.mkdir()
    for file in MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    tensors = {name: t.float() for name, t in load_file(MODEL_DIR / "model.safetensors").items()}
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"model_type": kind, "architectures": [CLASSES[kind]], "dtype": "float32"}
    badged, changes = BADGES[kind](tensors, config)
    save_file(badged, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def write_narrowed(folder: Path, name: str, **sizes: int) -> Path:
    """An output of shrink, of a class in NARROWED; `sizes` instead of those that stand there."""
    kind, usual, expected = NARROWED[name]
    model = write_badged(folder.with_name(f"{folder.name}-original"), kind)
    options = ShrinkOptions(
        sizes=SizeOptions(**sizes or usual), text=TEXT, narrow=NarrowOptions(local=None)
    )
    out = shrink(model, folder, options, device="cpu").out
    written = json.loads((out / "hf" / "config.json").read_text())["architectures"]
    assert written == [expected] or sizes
    return out


def _same(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    return tensors, {"sliding_window": None}


def _biased(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Qwen2 has biases, of which zero adds nothing; narrowing then fits them."""
    zeros = {
        name.replace(".weight", ".bias"): torch.zeros(len(tensor))
        for name, tensor in tensors.items()
        if any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj."))
    }
    return tensors | zeros, {"use_sliding_window": False}


def _fused(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    kept = dict(tensors)
    for name in tensors:
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in FUSED:
            fused, parts = FUSED[part]
            rows = [kept.pop(f"{module}.{one}.weight") for one in parts]
            kept[f"{module}.{fused}.weight"] = torch.cat(rows)
    return kept, {"sliding_window": None, "pad_token_id": 0}


def _neutral(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Granite with multipliers that its weights undo."""
    scaled = dict(tensors)
    scaled["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] / 12
    scaled["lm_head.weight"] = tensors["lm_head.weight"] * 8
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scaled[name] = tensor / 0.25
        if name.endswith("q_proj.weight"):
            scaled[name] = tensor * config["head_dim"] ** -0.5 / 0.125
    return scaled, {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
    }


def _normed(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Qwen3 gives every head one length, which is Llama's usual one here: attention stays near."""
    norms = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        scale = tensors[f"{prefix}input_layernorm.weight"]
        for part in "qk":
            rows = tensors[f"{prefix}self_attn.{part}_proj.weight"] * scale
            usual = float(rows.square().sum(1).mean().sqrt())
            norms[f"{prefix}self_attn.{part}_norm.weight"] = torch.full(
                (config["head_dim"],), usual
            )
    return tensors | norms, {"use_sliding_window": False}


FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
BADGES = {
    "llama": _same,
    "mistral": _same,
    "phi3": _fused,
    "qwen2": _biased,
    "qwen3": _normed,
    "granite": _neutral,
}
