"""Decoding through torch.compile: one graph for every step, over a cache of fixed size.

The prefill runs eagerly, as transformers' own `generate` does it: it fills buffers whose addresses
the compiled graph (and, on CUDA, its captured CUDA graph) then relies on.

Shapes: B sequences, L tokens of the longest prompt, C capacity of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache

from dotexport.errors import RuntimeMissingError, UsageError

from .torch_session import TorchSession

HEADROOM = 256


class CompiledSession(TorchSession):
    """A TorchSession whose cache never grows: attention reads all C slots, most of them masked.

    Args:
        model: of transformers, on its device.
        lean: see `HuggingFace.open`.
        capacity: C; None: HEADROOM more than the prompt.
    """

    def __init__(self, model: Any, *, lean: bool = False, capacity: int | None = None) -> None:
        super().__init__(model, lean=lean)
        self.capacity = capacity
        self.shape_BC: tuple[int, int] | None = None
        # CUDA graphs take away the launch of every kernel; there is nothing like it on the CPU.
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.compiled: Any = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(f"{provider}, decode compiled" for provider in super().providers)

    def forget(self, num_sequences: int, length: int) -> None:
        shape_BC = (num_sequences, self.capacity or length + HEADROOM)
        if shape_BC[1] < length:
            raise UsageError(f"a prompt of {length} tokens does not fit a cache of {shape_BC[1]}")
        if shape_BC == self.shape_BC:
            self.cache.reset()  # the same buffers: the graph stays valid
        else:
            self.cache = StaticCache(config=self.model.config, max_cache_len=shape_BC[1])
            self.shape_BC = shape_BC
        self.used = length

    def mask(self, length: int) -> torch.Tensor:
        """All slots, those to come included: only padding is masked, the rest by causality."""
        assert self.shape_BC is not None
        slot_C = torch.arange(self.shape_BC[1], device=self.device)
        padding_BC = (slot_C >= self.position_B[:, None]) & (slot_C < length)
        return (~padding_BC).long()

    def append(self) -> None:
        assert self.shape_BC is not None
        if self.used >= self.shape_BC[1]:
            raise UsageError(
                f"the cache of {self.shape_BC[1]} tokens is full; open the model with a larger "
                "capacity"
            )
        self.used += 1

    def decode(self, inputs: dict[str, Any]) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            logits_B1V: torch.Tensor = self.compiled(**inputs).logits
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().splitlines()
            raise RuntimeMissingError(
                f"torch.compile cannot compile this model here: {said[0] if said else error!r}; "
                "a C++ compiler (CPU) or Triton (CUDA) may be missing; or measure without --compile"
            ) from error
        return logits_B1V
