"""What a GGUF file holds, as a stock model: its sizes and tensors, dequantised by the gguf package.

llama.cpp's `llama` and `granite` compute the same but for four multipliers, so both are read as
Granite, whose config takes any number of heads for any width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import torch

from dotexport.errors import CheckpointError
from dotexport.models.rope import stock_config

FACTORS = "rope_freqs.weight"
MODEL_TYPES = {"llama": "granite", "granite": "granite", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = {"llama", "granite"}  # they turn neighbours of a head by one angle

# Keys below the architecture -> keys of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def interleaved(tensor_N: torch.Tensor, heads: int) -> torch.Tensor:
    """The two halves of every head, one row of each in turn; a matrix or a bias.

    >>> interleaved(torch.arange(8), heads=2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = tensor_N.reshape(heads, 2, -1, *tensor_N.shape[1:])
    return halves.transpose(1, 2).reshape(tensor_N.shape).contiguous()


def parted(tensor_N: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`.

    >>> parted(interleaved(torch.arange(8), heads=2), heads=2)
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    turns = tensor_N.reshape(heads, -1, 2, *tensor_N.shape[1:])
    return turns.transpose(1, 2).reshape(tensor_N.shape).contiguous()


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies rotated heads with; transformers' default as well."""
    return 0.1 * math.log(factor) + 1


def read_model(file: Path) -> Any:
    """The model of a file that `dotexport.targets.ggml` wrote, in float32.

    Raises:
        CheckpointError: a tensor is missing or left over.
    """
    from transformers import AutoModelForCausalLM

    from dotexport.exports.reference import no_initial_values

    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader, set(tensors))
    classes: Any = AutoModelForCausalLM
    with no_initial_values():
        model: Any = classes.from_config(config, dtype=torch.float32)
    model.tie_weights()  # skipping the initial values skips this too
    arch = _field(reader, "general.architecture")
    heads = {}
    if arch in INTERLEAVED:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(_arch(arch), config.num_hidden_layers)
    factors = tensors.pop(FACTORS, None)
    for name, parameter in model.named_parameters():  # a tied table comes up once
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored not in tensors:
            raise CheckpointError(f"{file} lacks {stored}; export it again")
        _fill(parameter, tensors.pop(stored), heads)
    if tensors:
        raise CheckpointError(f"{file} holds {', '.join(tensors)} beside what its sizes call for")
    if factors is not None:
        turned = model.model.rotary_emb.inv_freq
        turned /= torch.from_numpy(factors.data.copy())
    return model.eval()


def _fill(parameter: torch.Tensor, stored: Any, heads: dict[str, int]) -> None:
    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    parts = stored.name.split(".")
    if len(parts) > 2 and parts[2] in heads:
        values = parted(values, heads[parts[2]])
    if values.shape != parameter.shape:
        raise CheckpointError(
            f"{stored.name} is stored as {tuple(values.shape)} where the sizes of the file call "
            f"for {tuple(parameter.shape)}; export it again"
        )
    parameter.data.copy_(values)


def _arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    return reader.fields[name].contents() if name in reader.fields else default


def _config(reader: gguf.GGUFReader, tensors: set[str]) -> Any:
    arch = _field(reader, "general.architecture")
    settings = {key: _field(reader, f"{arch}.{name}") for name, key in SIZES.items()}
    kind = MODEL_TYPES[arch]
    if kind == "granite":
        settings |= {
            key: _field(reader, f"{arch}.{name}", 1.0) for name, key in MULTIPLIERS.items()
        }
        scale = _field(reader, f"{arch}.attention.scale")
        settings["attention_multiplier"] = scale or settings["head_dim"] ** -0.5
        settings["attention_bias"] = "blk.0.attn_q.bias" in tensors
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return stock_config(
        {
            **settings,
            "model_type": kind,
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": _rope(reader, arch),
            "pad_token_id": None,
        }
    )


def _rope(reader: gguf.GGUFReader, arch: str) -> dict[str, Any]:
    kind = _field(reader, f"{arch}.rope.scaling.type", "default")
    rope = {"rope_type": kind, "rope_theta": _field(reader, f"{arch}.rope.freq_base")}
    if kind != "default":
        rope["factor"] = factor = _field(reader, f"{arch}.rope.scaling.factor")
    if kind == "yarn":
        original = _field(reader, f"{arch}.rope.scaling.original_context_length")
        own = _field(reader, f"{arch}.rope.scaling.attn_factor", 1.0)
        rope["original_max_position_embeddings"] = original
        rope["attention_factor"] = own * yarn_attention(factor)
    return rope
