"""A whole model that reads one token of many rows at a time, over a cache of fixed size.

All rows stand at the same slot, so nothing is padded, gathered or moved. A row may begin anew at
any slot: what lies before is hidden from it, and its positions count from there.

Shapes: B rows, T slots of a row, t of them read; N query heads, G KV heads, R = N / G query heads
of one KV head, H width of a head, V vocabulary.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

ATTENTION = "dotexport_grouped"
AT_ONCE = 32  # rows whose probabilities are in memory: more would not stay in the CPU's cache


class FixedLayer(DynamicLayer):
    """Keys and values of one layer, (B, G, T, H), written slot by slot."""

    keys_BGTH: Tensor
    values_BGTH: Tensor

    def __init__(self, num_slots: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_slots, self.read = num_slots, 0
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.read:  # heads of layers may differ in width
            B, G, _, H = key_states.shape
            shape_BGTH = (B, G, self.num_slots, H)
            self.keys_BGTH = key_states.new_zeros(shape_BGTH)
            self.values_BGTH = value_states.new_zeros(shape_BGTH)
        self.keys_BGTH[:, :, self.read] = key_states[:, :, 0]
        self.values_BGTH[:, :, self.read] = value_states[:, :, 0]
        self.read += 1
        return self.keys_BGTH[:, :, : self.read], self.values_BGTH[:, :, : self.read]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0  # positions and mask are given; nothing else may depend on it


class Lockstep:
    """B rows of T slots. T may be no more than a sliding window: none is masked here."""

    def __init__(self, model: Any, num_slots: int) -> None:
        config, like = model.config, model.get_input_embeddings().weight
        config._attn_implementation = ATTENTION
        self.model, self.device, self.read_so_far = model, like.device, 0
        self.cache = DynamicCache(config=config)
        layers: list[Any] = self.cache.layers
        attending = [isinstance(layer, DynamicLayer) for layer in layers]
        # Of layers that attend to keys of others there is nothing.
        self.states = [layer for layer in layers if hasattr(layer, "recurrent_states")]
        self.cache.layers = [
            FixedLayer(num_slots) if one else layer
            for layer, one in zip(layers, attending, strict=True)
        ]
        self.slot_T = torch.arange(num_slots, device=self.device)
        self.none = like.new_zeros(())

    @torch.inference_mode()
    def read(self, token_B: Tensor, start_B: Tensor) -> Tensor:
        """logits_BV behind one more token of each row, whose text began at slot `start_B`."""
        slot = self.read_so_far
        self._begin(start_B == slot)
        seen_BT = self.slot_T[: slot + 1] >= start_B[:, None]
        mask_BT = torch.where(seen_BT, self.none, float("-inf"))
        with warnings.catch_warnings():
            # Some forwards have another name for it since 5.24, and others have not.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            logits_B1V: Tensor = self.model(
                input_ids=token_B[:, None],
                attention_mask=mask_BT[:, None, None],
                position_ids=(slot - start_B)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        self.read_so_far += 1
        return logits_B1V[:, 0]

    def _begin(self, anew_B: Tensor) -> None:
        """Layers that keep a state instead of slots: nothing is hidden there but by forgetting."""
        if not self.states or not self.read_so_far or not anew_B.any():
            return
        for layer in self.states:
            for kept in (layer.conv_states, layer.recurrent_states):
                for state_BX in kept.values():
                    if state_BX is not None:  # a convolution has no other state
                        state_BX[anew_B] = 0


def drawn(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token of each row at temperature 1: where its sum of probabilities passes `uniform_B`."""
    pieces = zip(logits_BV.split(AT_ONCE), uniform_B.split(AT_ONCE), strict=True)
    found = []
    for logits_CV, uniform_C in pieces:
        sums_CV = logits_CV.float().softmax(-1).cumsum(-1)
        height_C1 = uniform_C[:, None] * sums_CV[:, -1:]
        found.append(torch.searchsorted(sums_CV, height_C1, right=True)[:, 0])
    return torch.cat(found).clamp(max=logits_BV.shape[1] - 1)


def attend(
    module: torch.nn.Module,
    query_BN1H: Tensor,
    key_BGtH: Tensor,
    value_BGtH: Tensor,
    mask_B11t: Tensor,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token; the queries of a KV head are rows, so the cache is not repeated."""
    B, N, _, H = query_BN1H.shape
    query_BGRH = query_BN1H.reshape(B, key_BGtH.shape[1], -1, H)
    if softcap is None:
        mixed_BGRH = scaled_dot_product_attention(
            query_BGRH, key_BGtH, value_BGtH, attn_mask=mask_B11t, scale=scaling
        )
    else:
        score_BGRt = softcap * torch.tanh(query_BGRH @ key_BGtH.mT * scaling / softcap)
        mixed_BGRH = (score_BGRt + mask_B11t).softmax(-1) @ value_BGtH
    return mixed_BGRH.reshape(B, 1, N, H), None


AttentionInterface.register(ATTENTION, attend)
