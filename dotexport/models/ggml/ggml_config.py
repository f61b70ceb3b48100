"""The header of a GGUF file in the words of config.json.

llama.cpp's `llama` is Llama and Mistral at once: they compute the same, and the file is read as the
first of Llama, Mistral and Granite that holds its sizes and biases (models/families).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.families import find_carrier
from dotexport.models.families.ernie4_5 import ERNIE4_5
from dotexport.models.families.gemma2 import GEMMA2
from dotexport.models.families.gemma3 import GEMMA3
from dotexport.models.families.granite import GRANITE
from dotexport.models.families.llama import LLAMA
from dotexport.models.families.qwen2 import QWEN2
from dotexport.models.families.qwen3 import QWEN3
from dotexport.models.families.smollm3 import SMOLLM3
from dotexport.models.family import ALWAYS, Family
from dotexport.models.ggml.ggml_file import GgufFile
from dotexport.models.ggml.ggml_rope import read_rope
from dotexport.models.rope import in_all_words
from dotexport.models.shapes import MOST, read_sizes

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "granite": GRANITE,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "smollm3": SMOLLM3,
    "ernie4_5": ERNIE4_5,
}
# Keys below the architecture -> keys of config.json.
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
TABLE, HEAD = "token_embd.weight", "output.weight"
# Layers of the largest Gemmas, whose scores llama.cpp scales by the width of the stream per head;
# their heads are narrower.
LARGEST = {"gemma2": 46, "gemma3": 62}
PERIOD = {"gemma2": 2, "gemma3": 6}  # layers from one that sees everything to the next


def read_config(file: GgufFile) -> tuple[Family, dict[str, Any]]:
    """The table of the class that a file is read as, and its config.json, without special tokens.

    Raises:
        CheckpointError: the header lacks a size.
        UnsupportedModelError: an architecture without a family table, experts, layers that differ.
    """
    arch = file.architecture
    if arch not in FAMILIES:
        raise UnsupportedModelError(
            f"{file.path} is of llama.cpp's architecture {arch!r}; dotexport reads "
            f"{', '.join(FAMILIES)} from GGUF: give the model folder that it was made from"
        )
    if file.setting("expert_count", 0):
        raise UnsupportedModelError(
            f"{file.path} is a mixture of experts, which is not read from GGUF: give the model "
            "folder that it was made from"
        )
    if TABLE not in file.tensors:
        raise CheckpointError(f"{file.path} lacks {TABLE}; take a complete copy")
    if file.setting("block_count") > MOST["num_layers"]:
        raise CheckpointError(f"{file.path} tells of more layers than any model has")
    family = FAMILIES[arch]
    width = _head_dim(file)
    config: dict[str, Any] = {
        "vocab_size": file.shape(TABLE)[0],
        **{key: file.setting(name) for name, key in SIZES.items()},
        "num_key_value_heads": file.setting(
            "attention.head_count_kv", file.setting("attention.head_count")
        ),
        "head_dim": width,
        "tie_word_embeddings": HEAD not in file.tensors,
        "rope_parameters": read_rope(file, width),
        **{flag: True for flag in sorted(family.bias_flags) if _has_bias(file, family, flag)},
    }
    if arch == "llama":
        family = find_carrier(family, read_sizes(family, config))
    own = OF_CLASS[family.model_type](file, width) if family.model_type in OF_CLASS else {}
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    return family, in_all_words({**named, **config, **own})


def _head_dim(file: GgufFile) -> int:
    heads = file.setting("attention.head_count")
    width = file.setting("attention.key_length", file.setting("embedding_length") // max(heads, 1))
    if file.setting("attention.value_length", width) != width:
        raise UnsupportedModelError(
            f"{file.path} has keys and values of different widths, for which there is no table"
        )
    return int(width)


# Linears of a family -> their names in a file, where they may have a bias.
STORED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _has_bias(file: GgufFile, family: Family, flag: str) -> bool:
    """Whether the flag of config.json is on: one of the linears it is for has a bias."""
    named = {f".{STORED[linear.name]}.bias" for linear in family.linears if linear.bias == flag}
    return flag != ALWAYS and any(name.endswith(tuple(named)) for name in file.tensors)


def _mistral(file: GgufFile, width: int) -> dict[str, Any]:
    return {"sliding_window": None}  # the class has one where nothing is said, and llama.cpp none


def _granite(file: GgufFile, width: int) -> dict[str, Any]:
    scale = file.setting("attention.scale", 0.0) or width**-0.5
    scales = {key: float(file.setting(name, 1.0)) for name, key in MULTIPLIERS.items()}
    return {**scales, "attention_multiplier": scale}


def _gemma2(file: GgufFile, width: int) -> dict[str, Any]:
    return {
        **_gemma(file, width),
        "attn_logit_softcapping": file.setting("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.setting("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GgufFile, width: int) -> dict[str, Any]:
    cap = file.setting("final_logit_softcapping", 0.0)
    local = float(file.setting("rope.freq_base_swa", 10000.0))
    return {
        **_gemma(file, width),
        "final_logit_softcapping": cap or None,
        "rope_parameters": {
            "full_attention": read_rope(file, width),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma(file: GgufFile, width: int) -> dict[str, Any]:
    """No file says how scores are scaled: llama.cpp knows the largest model of each by its layers.

    Transformers' reader takes 256 for all, and has other scores for the largest.
    """
    layers, arch = file.setting("block_count"), file.architecture
    largest = layers == LARGEST[arch]
    per_head = file.setting("embedding_length") // file.setting("attention.head_count")
    pattern = file.field(f"{arch}.attention.sliding_window_pattern", PERIOD[arch])
    windowed = (
        [bool(one) for one in pattern]
        if isinstance(pattern, list)
        else [(layer + 1) % pattern != 0 for layer in range(layers)]
    )
    return {
        "query_pre_attn_scalar": per_head if largest else width,
        "sliding_window": file.setting("attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in windowed],
        "hidden_activation": "gelu_pytorch_tanh",
    }


OF_CLASS: Mapping[str, Callable[[GgufFile, int], dict[str, Any]]] = {
    "mistral": _mistral,
    "granite": _granite,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
