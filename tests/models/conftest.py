"""GGUF files of small models, some as llama.cpp's own converter would make them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport import embedded
from dotexport.models.checkpoint import Checkpoint

# Rows of whole superblocks, so that every precision has its own form.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """A folder of a small model with the tokenizer of the embedded one; see `_write_model`."""
    return _write_model


@pytest.fixture(scope="session")
def closed() -> Callable[[Any], Path]:
    return _closed


def _write_model(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    from transformers import AutoModelForCausalLM

    from dotexport.models.rope import stock_config

    torch.manual_seed(0)
    settings = {
        **WIDE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vocab_size": json.loads((embedded.MODEL_DIR / "config.json").read_text())["vocab_size"],
        **changes,
    }
    stock = AutoModelForCausalLM.from_config(stock_config(settings))
    for name, parameter in stock.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    stock.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded.MODEL_DIR / name, folder / name)
    return folder


# Gemma, which the target does not write: files as llama.cpp's converter makes them ---------------

GEMMA = {
    "gemma2": {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 64,
        "sliding_window": 32,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 64,
        "sliding_window": 32,
        "num_hidden_layers": 7,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}


def _write_gemma(folder: Path, arch: str, out: Path, **more: Any) -> Path:
    import gguf

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    writer = gguf.GGUFWriter(out, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    else:
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    add_letters(writer, config["vocab_size"])
    known = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    for name in checkpoint.files:
        values = checkpoint.tensor(name).float()
        values = values + 1 if name.endswith("norm.weight") else values
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = getattr(gguf.GGMLQuantizationType, "F32" if values.ndim == 1 else "F16")
        writer.add_tensor(stored, gguf.quantize(values.numpy(), kind), raw_dtype=kind)
    return _closed(writer)


def _closed(writer: Any) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def add_letters(writer: Any, size: int) -> None:
    """SentencePiece's kind of BPE as Gemma has it: no space in front, and two spaces a token."""
    import gguf

    Kind = gguf.TokenType
    start = ["<unk>", "<s>", "</s>", "  "]
    tokens = [*start, *(f"<0x{n:02X}>" for n in range(256)), *"\u2581helowrd", "he", "ll", "hell"]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.USER_DEFINED, *[Kind.BYTE] * 256]
    kinds += [Kind.NORMAL] * (len(tokens) - len(kinds))
    scores = [0.0] * 4 + [0.0] * 256 + [-float(n) for n in range(len(tokens) - 260)]
    scores[tokens.index("ll")], scores[tokens.index("he")] = -0.5, -0.75
    unused = range(len(tokens), size)
    tokens += [f"[PAD{number}]" for number in unused]
    kinds += [Kind.UNUSED] * len(unused)
    scores += [-1e4] * len(unused)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Architecture -> a folder of small numbers, and the file of it."""

    @cache
    def make(arch: str) -> tuple[Path, Path]:
        home = tmp_path_factory.mktemp(arch)
        folder = _write_model(home / "model", torch.float16, **{**GEMMA[arch], "vocab_size": 300})
        return folder, _write_gemma(folder, arch, home / "model.gguf")

    return make
