"""GGUF: one file with weights, sizes and tokenizer, for llama.cpp and what stands on it.

fp16 is F16, int8 is Q8_0, int4 is Q4_0 with tables in Q8_0; norms and biases stay F32. It is read
back by transformers' GGUF reader, which rounds nothing further: its logits are those of the file.
K-quants are made from the fp16 file by llama.cpp's own llama-quantize.

Shapes: O, I outputs and inputs of a matrix; N neurons of all heads of a projection.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from dotexport.errors import CheckpointError
from dotexport.rope import stock_config

if TYPE_CHECKING:
    import torch

    from dotexport.checkpoint import Checkpoint

    from .hf import TorchSession

logger = logging.getLogger(__name__)

FILE = "model.gguf"
ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA}
ROPES = {"default", "llama3"}

Type = gguf.GGMLQuantizationType
MATRICES = {"fp16": Type.F16, "int8": Type.Q8_0, "int4": Type.Q4_0}
FILE_TYPES = {
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
}
BLOCK = 32  # weights of a row that share one scale, in Q8_0 and Q4_0

# Which of llama.cpp's pre-tokenizers a tokenizer.json means, by what only its pattern has.
SPLITTERS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
}


class Gguf:
    """Writes with the gguf package; runs by transformers' GGUF reader, in float32 on torch."""

    name = "gguf"
    summary = "GGUF for llama.cpp (int8 is Q8_0, int4 is Q4_0), read back by transformers"
    precisions = ("fp16", "int8", "int4")
    weight_bits: ClassVar = {"fp16": (16, 16), "int8": (8.5, 8.5), "int4": (4.5, 8.5)}
    row_groups: ClassVar = {"int8": BLOCK, "int4": BLOCK}
    cache_bytes = 2  # what llama.cpp keeps unless told otherwise
    exact_rounding = ()  # rows that are no multiple of 32 stay F16

    def missing(self) -> list[str]:
        # transformers asks for it before it reads such a file
        return [] if importlib.util.find_spec("accelerate") else ["pip install accelerate"]

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .hf import HuggingFace

        return [
            *HuggingFace().problems(checkpoint, "as-stored"),
            *self.config_problems(checkpoint.config, precision),
            *_tokenizer_problems(checkpoint),
        ]

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        return _config_problems(config)

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        arch = ARCHITECTURES[checkpoint.config["architectures"][0]]
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
        _add_sizes(writer, checkpoint)
        _add_tokenizer(writer, checkpoint)
        writer.add_file_type(FILE_TYPES[precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tensors(writer, checkpoint, arch, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def open(self, folder: Path, *, threads: int | None = None) -> TorchSession:
        import torch

        from .hf import TorchSession

        if threads is not None:
            torch.set_num_threads(threads)
        return TorchSession(_read_back(folder))


def _config_problems(config: Any) -> list[str]:
    from .ort import rope_type

    problems = []
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        problems.append(
            f"architecture {architecture} is not written to GGUF; expected one of "
            f"{', '.join(ARCHITECTURES)}: convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    rope = rope_type(config)
    if rope not in ROPES:
        problems.append(
            f"rope_type {rope!r} is not written to GGUF; expected one of {', '.join(sorted(ROPES))}"
        )
    if config.get("hidden_act", "silu") != "silu":
        problems.append(
            f"hidden_act {config['hidden_act']!r} is not what llama.cpp computes for this "
            "architecture, silu; export it with another target"
        )
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % max(kv_heads, 1):
        problems.append(
            f"{heads} query heads do not divide into {kv_heads} KV heads; llama.cpp needs whole "
            "groups"
        )
    if config.get("quantization_config"):
        problems.append(
            "the weights are stored quantised (quantization_config); export the model they were "
            "made from"
        )
    return problems


def _tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    stored = _stored_tokenizer(checkpoint)
    added = [entry["id"] for entry in stored.get("added_tokens", [])]
    num_tokens = 1 + max([*stored["model"]["vocab"].values(), *added]) if stored else 0
    size = checkpoint.config.get("vocab_size") or 0
    if num_tokens <= size:
        return []
    return [
        f"tokenizer.json has {num_tokens} tokens where vocab_size is {size}, and llama.cpp needs a "
        "row for each; take the tokenizer that belongs to the model"
    ]


def _stored_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer.json, if it is byte-level BPE: the kind that is written here."""
    file = checkpoint.folder / "tokenizer.json"
    stored: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if stored.get("model", {}).get("type") != "BPE":
        return {}
    return stored if "ByteLevel" in json.dumps(stored.get("pre_tokenizer")) else {}


def _add_sizes(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    from .traced import head_dim

    config = checkpoint.config
    width = head_dim(config)
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_num_kv_heads(config))
    # Said, or llama.cpp would divide the hidden size by the heads.
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _rope(config: Any) -> dict[str, Any]:
    top = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return top | (config.get("rope_parameters") or config.get("rope_scaling") or {})


def _num_kv_heads(config: Any) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Byte-level BPE; for others the file says that it holds none, and takes token ids."""
    stored = _stored_tokenizer(checkpoint)
    if not stored:
        logger.warning(
            "the tokenizer of %s is no byte-level BPE and is left out of the GGUF file",
            checkpoint.folder,
        )
        writer.add_tokenizer_model("none")
        return
    model, size = stored["model"], checkpoint.config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(stored["pre_tokenizer"]))
    tokens, types = _tokens(model["vocab"], stored.get("added_tokens", []), size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    writer.add_token_merges(list(merges))
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        number = checkpoint.config.get(name)
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            add(number)
    writer.add_add_bos_token(_adds_start(stored.get("post_processor")))


def _splitter(pre_tokenizer: Any) -> str:
    """llama.cpp's name for a pre-tokenizer; ByteLevel alone is GPT-2's."""
    patterns = [
        part["pattern"].get("Regex", "")
        for part in pre_tokenizer.get("pretokenizers", [])
        if part.get("type") == "Split"
    ]
    if not patterns:
        return "gpt-2"
    for name, start in SPLITTERS.items():
        if patterns[0].startswith(start):
            return name
    logger.warning("llama.cpp may split text otherwise: its name for %r is unknown", patterns[0])
    return "default"


def _tokens(
    vocab: dict[str, int], added: Sequence[dict[str, Any]], size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    """Every id of the table, those that no text reaches included."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in vocab.items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for entry in added:
        special = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], special
    return tokens, types


def _adds_start(post_processor: Any) -> bool:
    """Whether every text is to begin with the start token."""
    return "SpecialToken" in json.dumps((post_processor or {}).get("single"))


def _add_tensors(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, arch: Any, precision: str
) -> None:
    config = checkpoint.config
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    if _rope(config).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(checkpoint))
    larger = []
    for name in checkpoint.files:
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old files carry what every reader computes
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise CheckpointError(f"{name} has no name in GGUF; export with another target")
        tensor = _turned(name, checkpoint.tensor(name).float(), config).numpy()
        kind = _type(stored, tensor.shape, precision)
        if kind == Type.F16 and precision != "fp16":
            larger.append(stored)
        writer.add_tensor(stored, gguf.quantize(tensor, kind), raw_dtype=kind)
    if larger:
        logger.warning(
            "%d tensors stay F16, because their rows are no multiple of %d: %s",
            *(len(larger), BLOCK, ", ".join(larger[:3])),
        )


def _type(name: str, shape: tuple[int, ...], precision: str) -> Any:
    if len(shape) == 1:
        return Type.F32
    if precision == "fp16" or shape[-1] % BLOCK:
        return Type.F16
    return Type.Q8_0 if name.startswith("token_embd") else MATRICES[precision]


def _turned(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp turns neighbours of a head by one angle, transformers a first and a second half."""
    if ".q_proj." in name:
        return _interleaved(tensor, config["num_attention_heads"])
    if ".k_proj." in name:
        return _interleaved(tensor, _num_kv_heads(config))
    return tensor


def _interleaved(tensor_N: torch.Tensor, heads: int) -> torch.Tensor:
    """The two halves of every head, one row of each in turn; a matrix or a bias."""
    halves = tensor_N.reshape(heads, 2, -1, *tensor_N.shape[1:])
    return halves.transpose(1, 2).reshape(tensor_N.shape).contiguous()


def _rope_factors(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """What each frequency is divided by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = stock_config(checkpoint.config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    theta, width = _rope(checkpoint.config)["rope_theta"], 2 * len(scaled)
    plain = theta ** -(np.arange(0, width, 2) / width)
    factors: NDArray[np.float32] = (plain / scaled.numpy()).astype(np.float32)
    return factors


def _read_back(folder: Path) -> Any:
    """The model that transformers reads, with what its reader leaves out: biases, rope factors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    config: Any = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    config.attention_bias = "blk.0.attn_q.bias" in tensors
    config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    classes: Any = AutoModelForCausalLM
    with redirect_stderr(io.StringIO()):  # progress bars of three libraries
        model = classes.from_pretrained(
            folder, gguf_file=FILE, config=config, dtype="float32", local_files_only=True
        )
    if "rope_freqs.weight" in tensors:
        model.model.rotary_emb.inv_freq /= model.model.rotary_emb.inv_freq.new_tensor(
            tensors["rope_freqs.weight"].data.copy()
        )
    return model.eval()
