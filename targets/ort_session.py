"""A graph of the model builder in onnxruntime, on the CPU or on CUDA, with its KV cache.

Shapes: B sequences, L tokens of the longest prompt, C capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.target import Logits, Session, Tokens

from .cuda import CUDA, require_cuda
from .growing import GrowingSession

CPU = "CPUExecutionProvider"
HEADROOM = 256  # free cache slots after the prompt; when they are used up, the cache doubles

# Type of a graph's input -> how ONNX numbers it, and what holds its bytes in numpy, which has no
# bfloat16 of its own.
STORED: dict[str, tuple[int, Any]] = {
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
}


def open_decoder(folder: Path, *, provider: str = CPU, threads: int | None = None) -> Session:
    """The session for what the builder wrote: its attention keeps the cache in place, or grows it.

    Raises:
        RuntimeMissingError: no onnxruntime, or `provider` fell back.
    """
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    session = open_graph(folder / config["model"]["decoder"]["filename"], threads, provider)
    if config["search"]["past_present_share_buffer"]:
        return OrtSession(session, config["model"], provider)
    return OrtGrowingSession(session, config["model"], provider)


class OrtSession:
    """onnxruntime with past and present bound to one buffer, as onnxruntime-genai runs it.

    The attention operator writes each sequence's next key at that sequence's own length, which it
    counts from the mask: padded slots are overwritten, and rows are packed to the left.
    """

    def __init__(self, session: Any, model: dict[str, Any], provider: str) -> None:
        decoder = model["decoder"]
        self.session = session
        self.binding = session.io_binding()
        self.providers = (provider,)
        self.device = "cuda" if provider == CUDA else "cpu"
        self.context: int = model["context_length"]
        self.vocab: int = model["vocab_size"]
        self.kv_heads: int = decoder["num_key_value_heads"]
        self.head_dim: int = decoder["head_size"]
        self.inputs: dict[str, str] = decoder["inputs"]
        self.logits: str = decoder["outputs"]["logits"]
        layers = range(decoder["num_hidden_layers"])
        past = ("past_key_names", "past_value_names")
        present = ("present_key_names", "present_value_names")
        self.past = [self.inputs[name] % layer for layer in layers for name in past]
        self.present = [decoder["outputs"][name] % layer for layer in layers for name in present]
        types = {port.name: port.type for port in (*session.get_inputs(), *session.get_outputs())}
        self.cache_type, self.cache_dtype = STORED[types[self.past[0]]]
        self.logits_dtype = STORED[types[self.logits]][1]

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        self.length_B = np.array([L] * B if lengths_B is None else lengths_B, dtype=np.int64)
        self._check_room(L)
        self.binding = self.session.io_binding()
        self._bind_cache([self._empty(B, min(L + HEADROOM, self.context)) for _ in self.past])
        return self._run(tokens_BL, np.tile(np.arange(L), (B, 1)), total=L)

    def step(self, tokens_B: Tokens) -> Logits:
        self.length_B = self.length_B + 1
        total = int(self.length_B.max())
        self._check_room(total)
        if total > self.cache[0].shape()[2]:
            self._grow()
        return self._run(tokens_B[:, None], self.length_B[:, None] - 1, total=total)[:, 0]

    def _run(self, tokens_BL: Tokens, position_BL: Tokens, *, total: int) -> Logits:
        logits_BLV = np.empty((*tokens_BL.shape, self.vocab), dtype=self.logits_dtype)
        values = {
            "input_ids": np.ascontiguousarray(tokens_BL, dtype=np.int64),
            "attention_mask": (np.arange(total) < self.length_B[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(position_BL),
        }
        for role, value in values.items():
            if role in self.inputs:  # with rotary inside the attention there are no position_ids
                self.binding.bind_cpu_input(self.inputs[role], value)
        self.binding.bind_output(
            self.logits, "cpu", 0, logits_BLV.dtype, logits_BLV.shape, logits_BLV.ctypes.data
        )
        self.session.run_with_iobinding(self.binding)
        return logits_BLV.astype(np.float32, copy=False)

    def _empty(self, B: int, capacity: int) -> Any:
        return self._placed(np.zeros((B, self.kv_heads, capacity, self.head_dim), self.cache_dtype))

    def _placed(self, array: NDArray[Any]) -> Any:
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _bind_cache(self, cache: list[Any]) -> None:
        self.cache = cache
        for past, present, buffer in zip(self.past, self.present, cache, strict=True):
            where = (self.device, 0, self.cache_type, buffer.shape(), buffer.data_ptr())
            self.binding.bind_input(past, *where)
            self.binding.bind_output(present, *where)

    def _grow(self) -> None:
        """Double the cache, so that a long decode copies each slot once on average."""
        B, _, filled, _ = self.cache[0].shape()
        capacity = min(2 * filled, self.context)
        wider = []
        for old in self.cache:
            new = np.zeros((B, self.kv_heads, capacity, self.head_dim), self.cache_dtype)
            new[:, :, :filled] = old.numpy()
            wider.append(self._placed(new))
        self._bind_cache(wider)

    def _check_room(self, length: int) -> None:
        if length > self.context:
            raise UsageError(
                f"a sequence of {length} tokens does not fit the context of {self.context}; "
                "use shorter prompts or decode fewer tokens"
            )


class OrtGrowingSession(GrowingSession):
    """onnxruntime where the graph joins past and new keys: what it gives back goes in again."""

    def __init__(self, session: Any, model: dict[str, Any], provider: str) -> None:
        decoder = model["decoder"]
        self.session = session
        self.providers = (provider,)
        self.device = "cuda" if provider == CUDA else "cpu"
        self.shape = decoder["num_key_value_heads"], 0, decoder["head_size"]
        ports = session.get_inputs()
        self.past = [port for port in ports if port.name.startswith("past_key_values.")]
        self.present = [port.name.replace("past_key_values", "present") for port in self.past]

    def forget(self, num_sequences: int) -> None:
        import onnxruntime as ort

        empty = [np.zeros((num_sequences, *self.shape), STORED[p.type][1]) for p in self.past]
        self.cache = [ort.OrtValue.ortvalue_from_numpy(array, self.device, 0) for array in empty]

    def run(self, tokens_BL: Tokens, position_BL: Tokens) -> Logits:
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens_BL)
        binding.bind_cpu_input("attention_mask", self.mask_BT)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(position_BL))
        for port, held in zip(self.past, self.cache, strict=True):
            binding.bind_ortvalue_input(port.name, held)
        binding.bind_output("logits")
        for name in self.present:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        logits, *self.cache = binding.get_outputs()
        logits_BLV: Logits = logits.numpy().astype(np.float32, copy=False)
        return logits_BLV


def open_graph(file: Path, threads: int | None, provider: str = CPU) -> Any:
    """An InferenceSession on this provider and no other, but for the shapes that CUDA leaves.

    Raises:
        RuntimeMissingError: no onnxruntime, or `provider` fell back.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeMissingError("onnxruntime is missing; pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a warning per unplaced shape node helps nobody
    options.intra_op_num_threads = threads or 0
    if provider == CUDA:
        return require_cuda(options, file)
    session = ort.InferenceSession(file, options, providers=[provider])
    if session.get_providers() != [provider]:
        raise RuntimeMissingError(
            f"asked onnxruntime for {provider} alone, got {', '.join(session.get_providers())}; "
            "reinstall onnxruntime"
        )
    return session
