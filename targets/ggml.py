"""GGUF: one file with weights, sizes and tokenizer, for llama.cpp and what stands on it.

fp16 is F16, int8 is Q8_0, int4 is Q4_0 with tables in Q8_0, int6-k is Q6_K, and int4-k, int3-k and
int2-k are llama.cpp's mixes Q4_K_M, Q3_K_M and Q2_K (ggml_mixes.py); norms and biases stay F32. A
file is read back by ggml_reading.py, and run in llama.cpp itself by llamacpp.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from dotexport.errors import CheckpointError
from dotexport.models.ggml.ggml_rope import FACTORS, yarn_attention
from dotexport.models.rope import stock_config

from . import kquants
from .configs import frequencies, head_dim, rope_type, rope_words, window_of
from .ggml_mixes import BLOCK, FILE_TYPES, IN_BLOCKS, stored_as

if TYPE_CHECKING:  # a measuring process needs an adapter, and no torch
    import torch

    from dotexport.exports.target import Session
    from dotexport.exports.text_parity import TextSide
    from dotexport.merging.rounding import Grid, Rounded
    from dotexport.models.checkpoint import Checkpoint
    from dotexport.models.family import Family
    from dotexport.models.shapes import Sizes

logger = logging.getLogger(__name__)

FILE = "model.gguf"
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "GraniteForCausalLM": gguf.MODEL_ARCH.GRANITE,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
    "Ernie4_5ForCausalLM": gguf.MODEL_ARCH.ERNIE4_5,
}
WITHOUT_BIASES = {gguf.MODEL_ARCH.QWEN3, gguf.MODEL_ARCH.SMOLLM3, gguf.MODEL_ARCH.ERNIE4_5}
NOT_ROTATED = 4  # every so many layers of SmolLM3, whatever a file says
# Those that read a file of rope factors, which is how llama.cpp carries Llama 3's frequencies.
WITH_FACTORS = {gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.GRANITE}
ROPES = {"default", "linear", "yarn", "llama3"}
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}

K_QUANTS = ("int6-k", "int4-k", "int3-k", "int2-k")


class Gguf:
    """Writes with the gguf package, whose dequantiser reads it back, in float32 on torch."""

    name = "gguf"
    summary = "GGUF for llama.cpp (Q8_0, Q4_0; -k are Q6_K, Q4_K_M, Q3_K_M, Q2_K)"
    precisions = ("fp16", "int8", "int4", *K_QUANTS)
    row_groups: ClassVar = dict.fromkeys(precisions[1:], BLOCK)
    best_rows: ClassVar = dict.fromkeys(K_QUANTS, kquants.SUPERBLOCK)
    cache_bytes = 2  # what llama.cpp keeps unless told otherwise
    exact_rounding = ()  # rows that are no multiple of 32 stay F16
    run_options = ("llama_cpp", "capacity", "lean")

    def missing(self) -> list[str]:
        return []  # this file would not have been imported without the gguf package

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .ggml_vocab import tokenizer_problems
        from .hf import HuggingFace

        return [
            *HuggingFace().problems(checkpoint, "as-stored"),
            *self.config_problems(checkpoint.config, precision),
            *tokenizer_problems(checkpoint),
        ]

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        return list(_config_problems(config))

    def stored_bytes(self, family: Family, sizes: Sizes, precision: str) -> int:
        """Of all tensors of a model of these sizes."""
        return sum(_bytes_by_name(family, sizes, precision).values())

    def read_bytes(self, family: Family, sizes: Sizes, precision: str) -> int:
        """Of the tensors that a decoded token reads whole: all but a table that is no head too."""
        stored = _bytes_by_name(family, sizes, precision)
        return sum(stored.values()) - (0 if sizes.tied else stored["token_embd.weight"])

    def grids(self, checkpoint: Checkpoint, precision: str) -> dict[str, Grid]:
        """Matrices that are stored as integers and multiplied, by the checkpoint's names."""
        from .ggml_blocks import GRIDS

        tied = checkpoint.config.get("tie_word_embeddings")
        return {
            name: GRIDS[kind]
            for name, stored, kind in _stored(checkpoint, precision)
            if kind in GRIDS and (tied or not stored.startswith("token_embd"))
        }

    def values(self, checkpoint: Checkpoint, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """What the matrices of a file are, by the checkpoint's names."""
        from dotexport.models.ggml.ggml_model import GgufModel

        model = GgufModel.open(folder / FILE)
        for name in checkpoint.specs:
            if len(checkpoint.specs[name].shape) == 2 and name in model.shapes:
                yield name, model.tensor(name)

    def write(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: str,
        rounded: Mapping[str, Rounded] | None = None,
    ) -> None:
        from .ggml_vocab import add_tokenizer

        arch = ARCHITECTURES[checkpoint.config["architectures"][0]]
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
        _add_sizes(writer, checkpoint)
        _add_rope(writer, checkpoint)
        add_tokenizer(writer, checkpoint)
        writer.add_file_type(FILE_TYPES[precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tensors(writer, checkpoint, arch, precision, rounded or {})
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def text(self, checkpoint: Checkpoint, folder: Path) -> TextSide | None:
        """What llama.cpp reads in the tokenizer of the file; None: the file takes token ids."""
        from dotexport.exports.text_parity import load_tokenizer

        from .ggml_text import excuses, read_text

        return read_text(folder / FILE, excuse=excuses(load_tokenizer(checkpoint.folder)))

    def wrong_in_file(
        self, checkpoint: Checkpoint, folder: Path, chosen: Collection[str] = ()
    ) -> list[str]:
        """What header and tensors are not the checkpoint's, but for those whose rounding was
        chosen."""
        from .ggml_weights import wrong_in_file

        arch = ARCHITECTURES[checkpoint.config["architectures"][0]]
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])  # which writes nothing
        _add_sizes(writer, checkpoint)
        _add_rope(writer, checkpoint)
        told = {name: said.value for part in writer.kv_data for name, said in part.items()}
        names = gguf.get_tensor_name_map(arch, checkpoint.config["num_hidden_layers"])
        tensors = (
            (
                names.get_name(name, try_suffixes=(".weight", ".bias")) or "",
                _turned(name, checkpoint.tensor(name).float(), checkpoint.config, arch).numpy(),
            )
            for name in checkpoint.files
            if name not in chosen
        )
        return wrong_in_file(folder / FILE, told, tensors)

    def check_options(self, runtime: Mapping[str, Any]) -> None:
        """Raises RuntimeMissingError where `llama_cpp` names no llama.cpp."""
        if where := runtime.get("llama_cpp"):
            from .llama_session import find_library

            find_library(Path(where))

    def open(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        llama_cpp: str | None = None,
        capacity: int | None = None,
        lean: bool = False,
    ) -> Session:
        """Read the file into a torch model, or load it in llama.cpp.

        Args:
            llama_cpp: a folder of llama.cpp, or one of its programs or libraries.
            capacity, lean: as for LlamaSession.
        """
        if llama_cpp is not None:
            from .llama_session import LlamaSession

            where, file = Path(llama_cpp), folder / FILE
            return LlamaSession(where, file, threads=threads, capacity=capacity, lean=lean)
        import torch

        from .ggml_reading import read_model
        from .torch_session import TorchSession

        if threads is not None:
            torch.set_num_threads(threads)
        return TorchSession(read_model(folder / FILE), lean=lean)


def _bytes_by_name(family: Family, sizes: Sizes, precision: str) -> dict[str, int]:
    from dotexport.models.shapes import shapes

    arch = ARCHITECTURES.get(family.architecture, gguf.MODEL_ARCH.LLAMA)
    names, found = gguf.get_tensor_name_map(arch, sizes.num_layers), {}
    for name, shape in shapes(family, sizes):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        kind = stored_as(
            *(stored, shape, precision),
            layers=sizes.num_layers,
            shared=sizes.num_attention_heads // sizes.num_key_value_heads,
            tied=sizes.tied,
        )
        weights, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        found[stored] = int(np.prod(shape)) // weights * num_bytes
    return found


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    architecture = (config.get("architectures") or ["none"])[0]
    arch = ARCHITECTURES.get(architecture)
    if arch is None:
        yield (
            f"architecture {architecture} is not written to GGUF; expected one of "
            f"{', '.join(ARCHITECTURES)}: convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    yield from _rope_problems(config, arch)
    window, context = window_of(config), config.get("max_position_embeddings") or 0
    if window and window < context:
        yield (
            f"sliding_window {window} is not known to llama.cpp in this architecture, which "
            f"attends to all; lower max_position_embeddings from {context} to {window}"
        )
    for flag in ("attention_bias", "mlp_bias", "use_bias"):
        if config.get(flag) and arch in WITHOUT_BIASES:
            name = gguf.MODEL_ARCH_NAMES[arch]
            yield f"{flag} has no place in llama.cpp's {name}; export with another target"
    if arch == gguf.MODEL_ARCH.SMOLLM3 and not unrotated_every(config, NOT_ROTATED):
        yield (
            f"no_rope_layers {config.get('no_rope_layers')} are not every {NOT_ROTATED}th, which "
            "is what llama.cpp's smollm3 leaves unrotated; keep the original's layers"
        )
    if config.get("hidden_act", "silu") != "silu":
        yield (
            f"hidden_act {config['hidden_act']!r} is not what llama.cpp computes for this "
            "architecture, silu; export it with another target"
        )
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % max(kv_heads, 1):
        yield (
            f"{heads} query heads do not divide into {kv_heads} KV heads; llama.cpp needs whole "
            "groups"
        )
    if config.get("quantization_config"):
        yield (
            "the weights are stored quantised (quantization_config); export the model they were "
            "made from"
        )


def unrotated_every(config: Mapping[str, Any], step: int) -> bool:
    """Whether the layers of SmolLM3 without a rotation are every so many, the first among them at
    that place."""
    stock = stock_config(config)
    rotated = stock.no_rope_layers[: stock.num_hidden_layers]
    return all(bool(one) == ((n + 1) % step != 0) for n, one in enumerate(rotated))


def _rope_problems(config: Mapping[str, Any], arch: Any) -> Iterator[str]:
    kind, rope = rope_type(config), rope_words(config)
    if kind not in ROPES:
        yield (
            f"rope_type {kind!r} is not written to GGUF; expected one of {', '.join(sorted(ROPES))}"
        )
    if kind == "llama3" and arch is not None and arch not in WITH_FACTORS:
        yield f"rope_type 'llama3' is left out by llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]}"
    other = {k: rope[k] for k, usual in YARN_DEFAULTS.items() if rope.get(k, usual) != usual}
    if kind == "yarn" and other:
        yield f"yarn with {other} is not what llama.cpp computes, {YARN_DEFAULTS}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor: this architecture of llama.cpp rotates whole heads"


def _add_sizes(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
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
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["architectures"][0] == "GraniteForCausalLM":
        writer.add_attention_scale(config.get("attention_multiplier", 1.0))
        writer.add_embedding_scale(config.get("embedding_multiplier", 1.0))
        writer.add_residual_scale(config.get("residual_multiplier", 1.0))
        writer.add_logit_scale(config.get("logits_scaling", 1.0))


def _add_rope(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    rope, kind = rope_words(checkpoint.config), rope_type(checkpoint.config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _, attention = frequencies(checkpoint.config, kind)
        original = rope.get("original_max_position_embeddings")
        context = checkpoint.config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original or context))
        writer.add_rope_scaling_attn_factors(attention / yarn_attention(float(rope["factor"])))
    if kind == "llama3":
        writer.add_tensor(FACTORS, _rope_factors(checkpoint))


def _rope_factors(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """What each frequency is divided by."""
    scaled, _ = frequencies(checkpoint.config, "llama3")
    theta, width = rope_words(checkpoint.config)["rope_theta"], 2 * len(scaled)
    plain = theta ** -(np.arange(0, width, 2) / width)
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors


def _num_kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _add_tensors(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    arch: Any,
    precision: str,
    rounded: Mapping[str, Rounded],
) -> None:
    import torch

    from .ggml_blocks import pack

    config, kinds = checkpoint.config, Counter[Any]()
    for name, stored, kind in _stored(checkpoint, precision):
        if len(checkpoint.specs[name].shape) > 1:
            kinds[kind] += 1
        if name in rounded:
            rows = torch.from_numpy(pack(rounded[name], kind))
            data = _turned(name, rows, config, arch).numpy()
        else:
            tensor = _turned(name, checkpoint.tensor(name).float(), config, arch).numpy()
            quantize = kquants.quantize if kind in kquants.FORMATS else gguf.quantize
            data = quantize(tensor, kind)
        writer.add_tensor(stored, data, raw_dtype=kind)
    for said in _stand_ins(kinds, precision):
        logger.warning(said)


def _stand_ins(kinds: Mapping[Any, int], precision: str) -> Iterator[str]:
    """What to say of matrices whose rows do not hold what the precision stores."""
    total = sum(kinds.values())
    if precision != "fp16" and (larger := kinds[gguf.GGMLQuantizationType.F16]):
        yield (
            f"{larger} of {total} matrices stay F16, because their rows are no multiple of "
            f"{BLOCK}; `dotexport plan MODEL --target gguf:{precision}` finds sizes that are"
        )
    blocks = {kind: number for kind, number in kinds.items() if kind in IN_BLOCKS.values()}
    if precision in K_QUANTS and blocks:
        names = ", ".join(sorted(kind.name for kind in blocks))
        yield (
            f"{sum(blocks.values())} of {total} matrices have rows that are no multiple of "
            f"{kquants.SUPERBLOCK}, as K-quants need: stored in {names} instead, which takes more "
            "bytes"
        )


def _stored(checkpoint: Checkpoint, precision: str) -> Iterator[tuple[str, str, Any]]:
    """The checkpoint's name of a tensor, llama.cpp's, and how it is stored."""
    config = checkpoint.config
    arch = ARCHITECTURES[config["architectures"][0]]
    layers, tied = config["num_hidden_layers"], bool(config.get("tie_word_embeddings"))
    shared = config["num_attention_heads"] // _num_kv_heads(config)
    names = gguf.get_tensor_name_map(arch, layers)
    for name in checkpoint.files:
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old files carry what every reader computes
        if name == "lm_head.weight" and tied:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise CheckpointError(f"{name} has no name in GGUF; export with another target")
        shape = checkpoint.specs[name].shape
        kind = stored_as(stored, shape, precision, layers=layers, shared=shared, tied=tied)
        yield name, stored, kind


def _turned(name: str, tensor: torch.Tensor, config: Mapping[str, Any], arch: Any) -> torch.Tensor:
    """Some architectures of llama.cpp turn neighbours of a head by one angle; transformers a first
    and a second half."""
    from dotexport.models.ggml.ggml_model import INTERLEAVED, interleaved

    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": _num_kv_heads(config)}
    for part, number in heads.items():
        if part in name and gguf.MODEL_ARCH_NAMES[arch] in INTERLEAVED:
            return interleaved(tensor, number)
    return tensor
