"""A decoder as one graph of torch.export, its KV cache among the inputs and outputs.

What openvino, onnx and executorch translate, each into its own language.

Shapes: B sequences, L new tokens, P tokens in the cache, T = P + L; G KV heads, H width of a head.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from .configs import head_dim, rope_type, states_of, window_of
from .hf import HuggingFace

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

Layers = list[tuple[torch.Tensor, torch.Tensor]]

# Their frequencies depend on the length of the text, and a graph holds one set of them.
CHANGING_ROPE = {"dynamic", "longrope"}
# How transformers computes a mixture, from release 5 on.
GATHERED = "_experts_implementation"


class Decoder(torch.nn.Module):
    """The stock model with plain tensors on both sides."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Layers,
    ) -> tuple[torch.Tensor, Layers]:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=filled_cache(past),
            use_cache=True,
        )
        layers = output.past_key_values.layers
        logits = output.logits if output.logits.dtype == torch.float32 else output.logits.float()
        return logits, [(layer.keys, layer.values) for layer in layers]


def filled_cache(past: Layers) -> DynamicCache:
    """Every layer keeps all its slots: a sliding window is left to the mask, which knows padding.

    Built by hand, because the cache's own way starts from an empty tensor of rank one, which not
    every runtime can join to one of rank four.
    """
    cache = DynamicCache()
    for keys, values in past:
        layer: Any = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def trace(checkpoint: Checkpoint, *, half: bool = False) -> ExportedProgram:
    """The graph of a stock checkpoint in float32: any batch, any length, any fill of the cache.

    Args:
        half: weights, cache and what is computed in float16; angles and logits stay float32.
    """
    model: Any = HuggingFace().open(checkpoint.folder).model
    gather_experts(model)
    if half:
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    inputs = _sample_inputs(model.config, torch.float16 if half else torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            Decoder(model), (), inputs, dynamic_shapes=_dynamic_axes(inputs), strict=False
        )


def gather_experts(model: Any) -> None:
    """Let a mixture multiply each token with the matrices of its experts, gathered: which tokens go
    to one expert is not known when a graph is written."""
    if hasattr(model.config, GATHERED):
        setattr(model.config, GATHERED, "batched_mm")


def _sample_inputs(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """No axis is 0 or 1, which would be taken for a constant; the mask is padded, or tracing could
    find it idle and leave it out."""
    B, L, P = 2, 3, 4
    heads = config.num_key_value_heads
    mask_BT = torch.ones(B, P + L, dtype=torch.long)
    mask_BT[0, 1] = 0
    empty_BGPH = torch.zeros(B, heads, P, head_dim(config.to_dict()), dtype=dtype)
    return {
        "input_ids": torch.ones(B, L, dtype=torch.long),
        "attention_mask": mask_BT,
        "position_ids": torch.arange(P, P + L).repeat(B, 1),
        "past": [(empty_BGPH.clone(), empty_BGPH.clone()) for _ in range(config.num_hidden_layers)],
    }


def _dynamic_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    both, cache = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return {name: both for name in inputs if name != "past"} | {
        "past": [(cache, cache) for _ in inputs["past"]]
    }


def trace_problems(checkpoint: Checkpoint, precision: str) -> list[str]:
    """Every reason why one graph with a plain cache cannot stand for this model."""
    stock = HuggingFace().problems(checkpoint, "as-stored")
    return stock + config_problems(checkpoint.config, precision)


def config_problems(config: Any, precision: str) -> list[str]:
    """Those that config.json alone gives."""
    return graph_problems(config, precision) + _window_problems(config)


def graph_problems(config: Any, precision: str) -> list[str]:
    """Those of any one graph, wherever its cache is kept."""
    problems = []
    rope = rope_type(config)
    if rope in CHANGING_ROPE:
        problems.append(
            f"rope_type {rope!r} changes its frequencies with the length of the text, and a graph "
            "holds one set of them; set it to 'default' if the context allows"
        )
    if odd := states_of(config):
        problems.append(
            f"layers of type {', '.join(odd)} keep another state than keys and values; "
            "take a model with plain attention"
        )
    if config.get("global_head_dim"):
        problems.append(
            f"layers of {', '.join(config.get('architectures') or ())} look at keys of other "
            "layers, and at heads of two widths, where such a graph has a cache for each layer and "
            "all of one width; run OUT/hf in transformers"
        )
    problems += _mixture_problems(config, precision)
    if config.get("quantization_config"):
        problems.append(
            "the weights are stored quantised (quantization_config); export the model they were "
            "made from"
        )
    if config.get("is_encoder_decoder"):
        problems.append("it is an encoder-decoder; only decoders are exported")
    return problems


def _mixture_problems(config: Any, precision: str) -> list[str]:
    if not config.get("num_experts_per_tok"):
        return []
    problems = []
    if not hasattr(PretrainedConfig, GATHERED):
        problems.append(
            "this release of transformers computes a mixture of experts in a way that no graph "
            "holds; pip install 'transformers>=5'"
        )
    if precision.startswith("int"):
        problems.append(
            "the experts of a mixture are most of its weights, and would not be rounded: the graph "
            "gathers their matrices before it multiplies; export it as fp32"
        )
    return problems


def _window_problems(config: Any) -> list[str]:
    window, context = window_of(config), config.get("max_position_embeddings") or 0
    if not window or window >= context:
        return []
    return [
        f"sliding_window {window} is counted in slots of the cache by such a graph, padding "
        f"included; lower max_position_embeddings from {context} to {window}"
    ]
