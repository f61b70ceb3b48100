"""A decoder as one graph of torch.export that keeps its KV cache inside, for one sequence.

What a phone's runtime wants: memory is planned when the graph is written, so the cache has a fixed
number of slots and a call a largest number of tokens. A token's slot is its position. One sequence
has no padding, so a sliding window, too, is counted in positions.

Shapes: L new tokens, T slots of the cache; N query heads, G KV heads, R = N / G query heads of one
KV head, H width of a head.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from .configs import head_dim, window_of
from .traced import gather_experts

ATTENTION = "dotexport_bounded"


class BoundedDecoder(torch.nn.Module):
    """The stock model over buffers that it writes to; input_ids_1L, cache_position_L -> logits."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model, self.context = model, context
        self.model.config._attn_implementation = ATTENTION
        for layer in range(model.config.num_hidden_layers):
            for role, shape in _slots(model.config, context).items():
                self.register_buffer(f"{role}_{layer}", torch.zeros(shape), persistent=False)

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            attention_mask=_masks(self.model.config, cache_position, self.context),
            position_ids=cache_position[None],
            past_key_values=self._cache(cache_position),
            use_cache=True,
        ).logits
        return logits

    def _cache(self, position_L: torch.Tensor) -> DynamicCache:
        cache = DynamicCache()
        for layer in range(self.model.config.num_hidden_layers):
            key_GHT, value_GTH = getattr(self, f"key_{layer}"), getattr(self, f"value_{layer}")
            cache.layers.append(BoundedLayer(key_GHT, value_GTH, position_L))
        return cache


class BoundedLayer(DynamicLayer):
    """Writes where it is told to; keys lie as attention multiplies them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position_L: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.position_L = keys, values, position_L
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Called by its name: as an assignment it would drop the axis of a single KV head, which
        # ExecuTorch's operator then looks for.
        put, at_L = torch.ops.aten.index_put_, self.position_L
        keys: torch.Tensor = put(self.keys, [None, None, at_L], key_states[0].transpose(1, 2))
        values: torch.Tensor = put(self.values, [None, at_L], value_states[0])
        return keys, values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0  # positions and mask are given; nothing else may depend on it


def trace_bounded(model: Any, *, context: int, chunk: int) -> ExportedProgram:
    """The graph of a stock model: 1 to `chunk` tokens a call, positions below `context`."""
    tokens = Dim.DYNAMIC(max=chunk)
    # Neither 0 nor 1 token, which would be taken for a constant.
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "cache_position": torch.arange(3)}
    axes = {"input_ids": {1: tokens}, "cache_position": {0: tokens}}
    gather_experts(model)
    decoder = BoundedDecoder(model, context).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(decoder, (), inputs, dynamic_shapes=axes, strict=False)


def attend(
    module: torch.nn.Module,
    query_1NLH: torch.Tensor,
    key_GHT: torch.Tensor,
    value_GTH: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in which the queries of one KV head are rows of one matrix.

    Products of three dimensions, because XNNPACK multiplies those, and none repeats the cache.

    Args:
        s_aux: sinks, a score of each query head that takes its share and gives nothing, (N,).
    """
    _, N, L, H = query_1NLH.shape
    G = key_GHT.shape[0]
    query = (query_1NLH * scaling).reshape(G, N // G * L, H)
    score = torch.bmm(query, key_GHT)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score + mask.flatten(0, 1)
    if s_aux is not None:
        sink = s_aux.view(G, N // G, 1, 1).expand(-1, -1, L, 1).reshape(G, N // G * L, 1)
        share = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
    else:
        share = score.softmax(-1)
    mixed = torch.bmm(share, value_GTH)
    return mixed.view(G, N // G, L, H).permute(2, 0, 1, 3).reshape(1, L, N, H), None


AttentionInterface.register(ATTENTION, attend)


def _slots(config: Any, context: int) -> dict[str, tuple[int, int, int]]:
    heads, width = config.num_key_value_heads, head_dim(config.to_dict())
    return {"key": (heads, width, context), "value": (heads, context, width)}


def _masks(config: Any, position_L: torch.Tensor, context: int) -> Any:
    """What is added to the scores of each kind of layer; one mask where all are of one kind."""
    kinds, window = set(getattr(config, "layer_types", None) or ()), window_of(config.to_dict())
    ratio = config.num_attention_heads // config.num_key_value_heads
    windowed = _mask(position_L, context, window, ratio)
    if kinds != {"full_attention", "sliding_attention"}:
        return windowed
    whole = _mask(position_L, context, None, ratio)
    return {"full_attention": whole, "sliding_attention": windowed}


def _mask(position_L: torch.Tensor, context: int, window: int | None, ratio: int) -> torch.Tensor:
    """0 where a token looks, minus infinity elsewhere; rows as `attend` lays out queries."""
    slot_T, position_L1 = torch.arange(context), position_L[:, None]
    seen_LT = slot_T <= position_L1
    if window is not None and window < context:
        seen_LT = seen_LT & (slot_T > position_L1 - window)
    mask_LT = torch.where(seen_LT, 0.0, float("-inf"))
    return mask_LT.repeat(ratio, 1)[None, None]
