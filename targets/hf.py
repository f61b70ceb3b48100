"""The stock checkpoint itself, run by transformers on torch: what vLLM and others load too.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from dotexport.errors import CheckpointError, RuntimeMissingError, UsageError
from dotexport.exports.reference import capped_attention
from dotexport.exports.target import Logits, Tokens
from dotexport.models.checkpoint import INDEX, Checkpoint, read_config
from dotexport.models.rope import in_all_words, stock_config
from dotexport.storage.output import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HuggingFace:
    """Loads with `AutoModelForCausalLM.from_pretrained`, without remote code."""

    name = "hf"
    summary = "stock transformers checkpoint: torch, vLLM, SGLang, TGI"
    precisions = ("as-stored",)
    exact_rounding = ()
    weight_bits: Mapping[str, tuple[float, float]] = {}  # as stored
    run_options = ("device", "dtype", "compiled", "capacity", "lean")

    def missing(self) -> list[str]:
        return []  # torch and transformers are what dotexport itself stands on

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        if checkpoint.config.get("auto_map"):
            return [
                "config.json names remote code (auto_map), which dotexport does not run; "
                "take a model whose class is in transformers"
            ]
        try:
            AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        try:
            stock_config(config)
        except Exception as error:  # whatever the config class objects to is the answer
            return [f"transformers refuses config.json: {_first_line(error)}"]
        return []

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        index = checkpoint.folder / INDEX
        for file in [*set(checkpoint.files.values()), *checkpoint.companions()]:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", in_all_words(checkpoint.config))
        if index.is_file():
            shutil.copyfile(index, folder / INDEX)

    def open(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "fp32",
        compiled: bool = False,
        capacity: int | None = None,
        lean: bool = False,
    ) -> TorchSession:
        """Load in float32 on the CPU, unless asked for something else.

        Args:
            threads: torch's setting for the whole process.
            device: as torch names it: "cpu", "cuda", "cuda:1".
            dtype: one of DTYPES.
            compiled: decode through torch.compile over a cache of fixed size.
            capacity: tokens that this cache holds; None: 256 more than the prompt.
            lean: answer as a server needs it: logits of the last position alone, left on the device
                (a tensor there, once it is computed; an array on the CPU).

        Raises:
            CheckpointError: tensors that config.json calls for are missing, or others are left.
            UsageError: no such dtype or device.
            RuntimeMissingError: torch does not see this device.
        """
        place, number = find_device(device), find_dtype(dtype)
        if threads is not None:
            torch.set_num_threads(threads)
        loader: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
        try:
            with _no_progress_bar():
                model, report = loader.from_pretrained(
                    folder,
                    dtype=number,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **capped_attention(read_config(folder)),
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot load {folder}: {_first_line(error)}; export it again"
            ) from error
        _check_complete(folder, report)
        _check_rope(folder, model.config)
        model = model.eval().to(place)
        if not compiled:
            return TorchSession(model, lean=lean)
        from .compiled import CompiledSession

        return CompiledSession(model, lean=lean, capacity=capacity)


def find_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: torch knows no such name.
        RuntimeMissingError: this torch does not see the device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown to torch; expected cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeMissingError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices and {name} "
            "was asked for; install a build of torch for CUDA and look at `dotexport doctor`"
        )
    return device


class TorchSession:
    """Transformers with its own growing cache.

    A cache slot of a padded position stays masked for good, and the positions of the tokens that
    follow go on from each prompt's own length.
    """

    def __init__(self, model: Any, *, lean: bool = False) -> None:
        self.model = model
        self.lean = lean
        self.device: torch.device = model.device
        self.apart: list[TorchSession] = []

    @property
    def providers(self) -> tuple[str, ...]:
        """Where the weights really lie, and as what."""
        return (f"torch on {_device_name(self.device)}, {self.number}",)

    @property
    def number(self) -> str:
        """One of DTYPES: what all weights are while they run, whatever was stored."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.model.dtype)

    @property
    def peak_device_bytes(self) -> int | None:
        """Most that torch ever allocated on the device; None on the CPU."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated(self.device))

    @torch.inference_mode()
    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        self.position_B = torch.tensor(lengths, device=self.device)
        self.apart = []
        if min(lengths) < L and getattr(self.model.config, "sliding_window", None):
            return self._start_apart(tokens_BL, lengths)
        self.forget(B, L)
        # Without padding no mask is needed, and attention takes its faster causal path.
        self.mask_BL = self.mask(L) if min(lengths) < L else None
        position_BL = torch.arange(L, device=self.device).expand(B, L)
        logits_BLV = self._run(self._inputs(self._tokens(tokens_BL), position_BL))
        answer_BLV: Logits = self._answer(logits_BLV)
        return answer_BLV

    @torch.inference_mode()
    def step(self, tokens_B: Tokens) -> Logits:
        if self.apart:
            alone = zip(self.apart, tokens_B, strict=True)
            return np.concatenate([session.step(token[None]) for session, token in alone])
        self.append()
        logits_B1V = self.decode(
            self._inputs(self._tokens(tokens_B)[:, None], self.position_B[:, None])
        )
        self.position_B = self.position_B + 1
        answer_BV: Logits = self._answer(logits_B1V[:, 0])
        return answer_BV

    def forget(self, num_sequences: int, length: int) -> None:
        """An empty cache for prompts of this length."""
        self.cache: Any = DynamicCache(config=self.model.config)

    def mask(self, length: int) -> torch.Tensor:
        """Which slots of the cache hold tokens, not padding."""
        return (torch.arange(length, device=self.device) < self.position_B[:, None]).long()

    def append(self) -> None:
        """One more slot of every sequence is in use."""
        if self.mask_BL is not None:
            seen = self.mask_BL.new_ones(len(self.position_B), 1)
            self.mask_BL = torch.cat([self.mask_BL, seen], dim=1)

    def decode(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self._run(inputs)

    def _run(self, inputs: dict[str, Any]) -> torch.Tensor:
        with warnings.catch_warnings():
            # Granite's forward has another name for it since 5.24, and the others have not.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            logits_BLV: torch.Tensor = self.model(**inputs).logits
        return logits_BLV

    def _start_apart(self, tokens_BL: Tokens, lengths: Sequence[int]) -> Logits:
        """A window counts slots of the cache, padding included: every prompt gets a cache alone."""
        self.apart = [TorchSession(self.model) for _ in lengths]
        logits_BLV = np.zeros((*tokens_BL.shape, self.model.config.vocab_size), dtype=np.float32)
        for row, (session, length) in enumerate(zip(self.apart, lengths, strict=True)):
            logits_BLV[row, :length] = session.start(tokens_BL[row : row + 1, :length])[0]
        return logits_BLV

    def _tokens(self, tokens: Tokens) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)

    def _inputs(self, token_BL: torch.Tensor, position_BL: torch.Tensor) -> dict[str, Any]:
        return {
            "input_ids": token_BL,
            "attention_mask": self.mask_BL,
            "position_ids": position_BL,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": int(self.lean),
        }

    def _answer(self, logits: torch.Tensor) -> Any:
        if self.lean and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a kernel that was launched is no answer yet
            return logits
        return logits.float().cpu().numpy()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)})"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A library does not print; transformers would."""
    switch: Any = transformers_logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, report[kind])) for kind in kinds if report.get(kind)}
    if wrong:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(v)}" for kind, v in wrong.items())
        raise CheckpointError(
            f"{folder} does not hold exactly the tensors its config.json calls for ({listed}); "
            "export it again"
        )


def _check_rope(folder: Path, read: Any) -> None:
    """Release 4.57 passes over the words of release 5 in silence."""
    meant = stock_config(read_config(folder))
    for key in ("rope_theta", "rope_scaling"):
        if getattr(read, key, None) != getattr(meant, key, None):
            raise CheckpointError(
                f"transformers {transformers.__version__} takes {key} = {getattr(read, key, None)} "
                f"for {folder}, whose config.json means {getattr(meant, key, None)} and says so in "
                "rope_parameters only; dotexport export MODEL --target hf -o OUT says it in words "
                "that every release reads"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
