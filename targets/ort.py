"""ONNX Runtime on the CPU, through the graphs of onnxruntime-genai's model builder.

The builder fuses attention, rotary embedding and norms into single operators and keeps the KV
cache in place; onnxruntime-genai itself loads the folder as it is.

Shapes: B sequences, L tokens of the longest prompt, C capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dotexport.adapter import QUANTISED_BLOCK, Logits, Tokens
from dotexport.errors import DotexportError, RuntimeMissingError, UsageError

from .genai_builder import builder_problems

if TYPE_CHECKING:
    from dotexport.checkpoint import Checkpoint

Array = NDArray[np.float32]

PROVIDER = "CPUExecutionProvider"
SILENTLY_WRONG_ROPE = {"linear", "dynamic", "yarn"}  # found by verify
HEADROOM = 256  # free cache slots after the prompt; when they are used up, the cache doubles


# Runs the builder with the one answer changed that it has no option for: rotary embedding inside
# the attention operator, which that operator refuses for heads that are no multiple of 16.
ROTARY_OUTSIDE = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from builders.base import Model
Model.is_fused_rope_supported = lambda self: False
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class OrtCpu:
    """Writes with the model builder in a process of its own; runs with onnxruntime."""

    name = "ort-cpu"
    summary = "ONNX Runtime on the CPU; onnxruntime-genai loads the same folder"
    precisions = ("fp32", "int4")
    exact_rounding = ("int4",)
    weight_bits: ClassVar = {"fp32": (32, 32), "int4": (5, 32)}  # a float32 scale per 32

    def missing(self) -> list[str]:
        wanted = {
            "onnxruntime": "pip install onnxruntime (or onnxruntime-gpu, never both)",
            "onnxruntime_genai": "pip install onnxruntime-genai (or onnxruntime-genai-cuda)",
            "onnx_ir": "pip install onnx-ir",
        }
        absent = [how for module, how in wanted.items() if importlib.util.find_spec(module) is None]
        return absent or builder_problems()

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        config = checkpoint.config
        return [*self.config_problems(config, precision), *_folder_problems(checkpoint)]

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        return _config_problems(config)

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        with tempfile.TemporaryDirectory(prefix="dotexport-") as cache:
            command = [
                *_builder_command(rotary_inside=_head_dim(checkpoint.config) % 16 == 0),
                *("--input", str(checkpoint.folder)),
                *("--output", str(folder), "--precision", precision),
                *("--execution_provider", "cpu", "--cache_dir", cache),
                *("--extra_options", *_options(checkpoint, precision)),
            ]
            _run_quietly(command)

    def open(self, folder: Path, *, threads: int | None = None) -> OrtSession:
        return OrtSession(folder, threads=threads)


def _options(checkpoint: Checkpoint, precision: str) -> list[str]:
    # Sliding windows stay, but over a whole cache: one that evicts cannot be right-padded.
    options = ["hf_token=false", "windowed_kv_cache=false"]
    if _head_dim(checkpoint.config) % 16:
        options.append("fuse_qkv=false")  # a separate rotary operator reads q and k separately
    if precision == "int4":
        # Blocks of 32 lose least and pad least when a width is no multiple of 128. Level 4 rounds
        # activations to int8 inside the product: several times faster than level 1 on CPUs.
        options += [f"block_size={QUANTISED_BLOCK}", "accuracy_level=4"]
    return options


def _builder() -> Path:
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or found.origin is None:
        raise RuntimeMissingError("onnxruntime-genai is missing; pip install onnxruntime-genai")
    return Path(found.origin).parent / "models" / "builder.py"


def _builder_command(*, rotary_inside: bool) -> list[str]:
    if rotary_inside:
        return [sys.executable, str(_builder())]
    return [sys.executable, "-c", ROTARY_OUTSIDE, str(_builder())]


def _run_quietly(command: Sequence[str]) -> None:
    """Run the builder offline; its many lines matter only when it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return
    last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
    raise DotexportError(
        f"the model builder of onnxruntime-genai ended with code {done.returncode}; "
        f"its last lines:\n{last}\nCheck that onnxruntime-genai and transformers fit together "
        "(dotexport targets), or export with another target"
    )


def _config_problems(config: Any) -> list[str]:
    problems = []
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _known_architectures():
        problems.append(
            f"architecture {architecture} is unknown to the installed model builder; "
            "export it with another target"
        )
    heads = config.get("num_attention_heads") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % max(kv_heads, 1):
        problems.append(
            f"{heads} query heads do not divide into {kv_heads} KV heads; "
            "GroupQueryAttention needs whole groups"
        )
    head_dim = _head_dim(config)
    if head_dim % 8:
        problems.append(
            f"head_dim {head_dim} is no multiple of 8, which GroupQueryAttention needs; "
            "choose a model with other heads"
        )
    rope = rope_type(config)
    if rope in SILENTLY_WRONG_ROPE:
        problems.append(
            f"rope_type {rope!r} is written by the model builder as plain rotary embedding, "
            "without a word; export it with another target"
        )
    window, context = window_of(config), config.get("max_position_embeddings") or 0
    if window and window < context:
        problems.append(
            f"sliding_window {window} is left out by the model builder, which is exact only for "
            f"contexts up to it; lower max_position_embeddings from {context} to {window}"
        )
    return problems + _confused_widths(config, heads * head_dim, kv_heads * head_dim)


def _head_dim(config: Any) -> int:
    heads = config.get("num_attention_heads") or 1
    return int(config.get("head_dim") or config.get("hidden_size", 0) // heads)


def rope_type(config: Any) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def window_of(config: Any) -> int | None:
    """How far back a layer attends, where a class has a window at all."""
    kind = config.get("model_type")
    if kind in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return None
    default = 4096 if kind == "mistral" else None
    in_layers = kind in ("mistral", "qwen2", "qwen3", "phi3")
    window: int | None = config.get("sliding_window", default) if in_layers else None
    return window


def _confused_widths(config: Any, q_width: int, kv_width: int) -> list[str]:
    """The builder takes every linear layer with `vocab_size` outputs for the output head."""
    widths = {
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "the width of all query heads": q_width,
        "the width of all KV heads": kv_width,
    }
    vocab = config.get("vocab_size")
    return [
        f"{name} equals vocab_size ({vocab}), so the model builder would take such a layer for "
        "the output head; choose another width"
        for name, width in widths.items()
        if width == vocab
    ]


def _folder_problems(checkpoint: Checkpoint) -> list[str]:
    files = {file.name for file in checkpoint.companions()}
    if files & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return []
    return [
        f"{checkpoint.folder} has no tokenizer (tokenizer.json or tokenizer.model), which the "
        "model builder needs; copy the tokenizer files of the base model into it"
    ]


@cache
def _known_architectures() -> set[str]:
    # The builder has no list to import, and importing it would load half of transformers.
    text = _builder().read_text(encoding="utf-8")
    return set(re.findall(r'architectures\[0\] == "(\w+)"', text))


class OrtSession:
    """onnxruntime with past and present bound to one buffer, as onnxruntime-genai runs it.

    The attention operator writes each sequence's next key at that sequence's own length, which it
    counts from the mask: padded slots are overwritten, and rows are packed to the left.
    """

    providers = (PROVIDER,)

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._read_config(folder)
        self.session = open_graph(folder / self.filename, threads)
        self.binding = self.session.io_binding()

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        self.length_B = np.array([L] * B if lengths_B is None else lengths_B, dtype=np.int64)
        self._check_room(L)
        self.binding = self.session.io_binding()
        self._bind_cache(self._empty_cache(B, min(L + HEADROOM, self.context)))
        return self._run(tokens_BL, np.tile(np.arange(L), (B, 1)), total=L)

    def step(self, tokens_B: Tokens) -> Logits:
        self.length_B = self.length_B + 1
        total = int(self.length_B.max())
        self._check_room(total)
        if total > self.cache[0].shape[2]:
            self._grow()
        return self._run(tokens_B[:, None], self.length_B[:, None] - 1, total=total)[:, 0]

    def _run(self, tokens_BL: Tokens, position_BL: Tokens, *, total: int) -> Logits:
        logits_BLV = np.empty((*tokens_BL.shape, self.vocab), dtype=np.float32)
        values = {
            "input_ids": np.ascontiguousarray(tokens_BL, dtype=np.int64),
            "attention_mask": (np.arange(total) < self.length_B[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(position_BL),
        }
        for role, value in values.items():
            if role in self.inputs:  # with rotary inside the attention there are no position_ids
                self.binding.bind_cpu_input(self.inputs[role], value)
        _bind_output(self.binding, self.outputs["logits"], logits_BLV)
        self.session.run_with_iobinding(self.binding)
        return logits_BLV

    def _read_config(self, folder: Path) -> None:
        model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        self.filename: str = decoder["filename"]
        self.context: int = model["context_length"]
        self.vocab: int = model["vocab_size"]
        self.kv_heads: int = decoder["num_key_value_heads"]
        self.head_dim: int = decoder["head_size"]
        self.inputs: dict[str, str] = decoder["inputs"]
        self.outputs: dict[str, str] = decoder["outputs"]
        layers = range(decoder["num_hidden_layers"])
        past = ("past_key_names", "past_value_names")
        present = ("present_key_names", "present_value_names")
        self.past = [self.inputs[name] % layer for layer in layers for name in past]
        self.present = [self.outputs[name] % layer for layer in layers for name in present]

    def _empty_cache(self, B: int, capacity: int) -> list[Array]:
        shape = (B, self.kv_heads, capacity, self.head_dim)
        return [np.zeros(shape, dtype=np.float32) for _ in self.past]

    def _bind_cache(self, cache: list[Array]) -> None:
        self.cache = cache
        for past, present, buffer in zip(self.past, self.present, cache, strict=True):
            self.binding.bind_cpu_input(past, buffer)
            _bind_output(self.binding, present, buffer)

    def _grow(self) -> None:
        """Double the cache, so that a long decode copies each slot once on average."""
        B, _, filled, _ = self.cache[0].shape
        wider = self._empty_cache(B, min(2 * filled, self.context))
        for old, new in zip(self.cache, wider, strict=True):
            new[:, :, :filled] = old
        self._bind_cache(wider)

    def _check_room(self, length: int) -> None:
        if length > self.context:
            raise UsageError(
                f"a sequence of {length} tokens does not fit the context of {self.context}; "
                "use shorter prompts or decode fewer tokens"
            )


def open_graph(file: Path, threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeMissingError("onnxruntime is missing; pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a warning per unplaced shape node helps nobody
    options.intra_op_num_threads = threads or 0
    session = ort.InferenceSession(file, options, providers=[PROVIDER])
    if session.get_providers() != [PROVIDER]:
        raise RuntimeMissingError(
            f"asked onnxruntime for {PROVIDER} alone, got {', '.join(session.get_providers())}; "
            "reinstall onnxruntime"
        )
    return session


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
