"""A model of transformers as a session, with its own growing cache.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from dotexport.exports.target import Logits, Tokens

SLOTS = {"full_attention", "sliding_attention"}  # kinds of layers that keep keys and values
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchSession:
    """Transformers with its own growing cache.

    A cache slot of a padded position stays masked for good, and the positions of the tokens that
    follow go on from each prompt's own length.
    """

    def __init__(
        self, model: Any, *, lean: bool = False, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.lean = lean
        # Weights that are on disk are nowhere until they are called.
        self.device: torch.device = device or model.device
        self.apart: list[TorchSession] = []

    @property
    def config(self) -> Any:
        """Of the language model, which a model that sees has among others."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def providers(self) -> tuple[str, ...]:
        """Where the weights really lie, and as what."""
        disk = ", weights on disk" if self.on_disk else ""
        return (f"torch on {_device_name(self.device)}, {self.number}{disk}",)

    @property
    def on_disk(self) -> bool:
        """Whether every answer reads the weights from their files."""
        return bool(self.model.device.type == "meta")

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
        if min(lengths) < L and _counts_padding(self.config):
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
        """Every prompt gets a cache alone."""
        self.apart = [TorchSession(self.model, device=self.device) for _ in lengths]
        logits_BLV = np.zeros((*tokens_BL.shape, self.config.vocab_size), dtype=np.float32)
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


def _counts_padding(config: Any) -> bool:
    """Whether padding behind a prompt changes what follows: a window counts slots of the cache, and
    the state of a layer without slots goes on through all that it reads."""
    kinds = set(getattr(config, "layer_types", None) or ()) - SLOTS
    return bool(kinds) or getattr(config, "sliding_window", None) is not None


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)})"
