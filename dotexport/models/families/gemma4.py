"""Gemma 4 (text, dense): Gemma 3 whose layers have an input of their own, and of which the last
ones look at keys and values of earlier ones.

A token has a row of a second table for all layers, which most of a small model is. Layers that see
everything have wider heads; the last layers take keys and values from the last one of their kind
that has its own, and may have MLPs of twice the width. So depth and heads stay: what a layer keeps
others read, and the second table and its projection have a part for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.families.gemma2 import GEMMA2, between_norms
from dotexport.models.families.llama import sublayers
from dotexport.models.families.qwen3 import HEAD_NORMS
from dotexport.models.family import InnerNorm, Linear, PerLayer, Sublayer
from dotexport.models.rope import stock_config

SLIDING, FULL = "sliding_attention", "full_attention"
BY_LAYER = "per_layer_config"
SHARED, WIDE = ", keys of another", ", wide"
REFUSED = (
    ("enable_moe_block", "has experts beside its MLP"),
    ("attention_k_eq_v", "takes keys for values"),
)

VALUE_NORM = InnerNorm("self_attn.v_norm", "self_attn.v_proj", weighted=False)
ATTENTION, MLP = between_norms(
    *sublayers(
        readers="attention_bias",
        writer="attention_bias",
        inner_norms=(*HEAD_NORMS, VALUE_NORM),
    )
)
QUERY, KEY, VALUE = ATTENTION.readers


def with_global_heads(attention: Sublayer) -> Sublayer:
    """The same with heads of global_head_dim."""
    return replace(
        attention,
        readers=tuple(replace(r, out=f"global_{r.out}") for r in attention.readers),
        writer=replace(attention.writer, in_="global_query"),
        inner_norms=tuple(replace(n, head="global_head_dim") for n in attention.inner_norms),
    )


QUERIES = replace(ATTENTION, readers=(QUERY,), inner_norms=HEAD_NORMS[:1])
WIDE_MLP = replace(
    MLP,
    readers=tuple(replace(reader, out="wide_mlp") for reader in MLP.readers),
    writer=replace(MLP.writer, in_="wide_mlp"),
)
INPUT = Sublayer(
    module="per_layer_input_gate",
    norm=None,
    readers=(Linear("per_layer_input_gate", out="layer_input", in_="residual"),),
    writer=Linear("per_layer_projection", out="residual", in_="layer_input"),
    output_norm="post_per_layer_input_norm",
    given=True,
    scaled_by="layer_scalar",
)
ATTENTIONS = {
    SLIDING: ATTENTION,
    FULL: with_global_heads(ATTENTION),
    SLIDING + SHARED: QUERIES,
    FULL + SHARED: with_global_heads(QUERIES),
}


def kinds_of(stock: Any) -> list[str]:
    """Of each layer: what it sees, whose keys it looks at, how wide its MLP is."""
    own = stock.num_hidden_layers - stock.num_kv_shared_layers
    others = SHARED + (WIDE if stock.use_double_wide_mlp else "")
    return [kind + (others if n >= own else "") for n, kind in enumerate(stock.layer_types)]


def unread(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys and values of layers that look at those of others: files may hold some all the same."""
    count, shared = (config.get(key) or 0 for key in ("num_hidden_layers", "num_kv_shared_layers"))
    parts = ("k_proj.", "v_proj.", "k_norm.", "v_norm.")
    layers = range(count - shared, count)
    return tuple(f"model.layers.{n}.self_attn.{part}" for n in layers for part in parts)


def as_built(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the width of heads that see everything in one word, and no sizes by the layer.

    Raises:
        UnsupportedModelError: words that make a model of it that there is no table for.
        CheckpointError: layers that look at keys of layers that are not there.
    """
    if any(config.get(flag) for flag, _ in REFUSED):
        return dict(config)  # to be refused by that name
    try:
        stock = stock_config(config)
        said = stock.to_dict().get(BY_LAYER)
    except Exception:  # check_class says what is wrong with it
        return dict(config)
    if stock.use_bidirectional_attention == "all":
        raise _unsupported("use_bidirectional_attention = all", "attends to later tokens too")
    if not stock.hidden_size_per_layer_input:
        raise _unsupported("hidden_size_per_layer_input = 0", "gives layers no input of their own")
    if stock.vocab_size_per_layer_input != stock.vocab_size:
        raise _unsupported(
            f"vocab_size_per_layer_input = {stock.vocab_size_per_layer_input} and vocab_size = "
            f"{stock.vocab_size}",
            "has tables of two vocabularies",
        )
    own = stock.layer_types[: stock.num_hidden_layers - stock.num_kv_shared_layers]
    if not set(stock.layer_types) <= set(own):
        raise CheckpointError(
            f"config.json gives num_kv_shared_layers = {stock.num_kv_shared_layers}, and among the "
            f"{len(own)} layers in front none of a kind whose keys those look at; take the "
            "config.json that belongs to these weights"
        )
    # The last layer is one that sees everything: the class insists on it.
    built = {key: value for key, value in config.items() if key != BY_LAYER}
    built["global_head_dim"] = stock.per_layer_config[-1].head_dim
    if stock_config(built).to_dict().get(BY_LAYER) != said:
        raise _unsupported(f"a {BY_LAYER}", "has layers of other sizes than heads of two widths")
    return built


def _unsupported(words: str, meaning: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json gives {words}, with which Gemma4ForCausalLM {meaning}; dotexport narrows the "
        "small dense models of Gemma 4 (E2B, E4B) as they are published"
    )


LAYERS = {
    name + wide: (attention, mlp, INPUT)
    for name, attention in ATTENTIONS.items()
    for wide, mlp in (("", MLP), (WIDE, WIDE_MLP))
    if not wide or name.endswith(SHARED)
}
GEMMA4 = replace(
    GEMMA2,
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    sublayers=(*ATTENTIONS.values(), MLP, WIDE_MLP, INPUT),
    kinds=tuple(LAYERS.items()),
    kinds_of=kinds_of,
    spaces=(
        ("global_query", ("num_attention_heads", "global_head_dim")),
        ("global_kv", ("num_key_value_heads", "global_head_dim")),
        ("global_head_dim", ("global_head_dim",)),
        ("wide_mlp", ("intermediate_size", 2)),
        ("layer_input", ("hidden_size_per_layer_input",)),
        ("layer_inputs", ("num_hidden_layers", "hidden_size_per_layer_input")),
    ),
    per_layer=PerLayer(
        table="model.embed_tokens_per_layer",
        rows_key="vocab_size_per_layer_input",
        projection=Linear("model.per_layer_model_projection", out="layer_inputs", in_="residual"),
        norm="model.per_layer_projection_norm",
        features="layer_input",
    ),
    stays=(
        ("num_key_value_heads", "would leave heads of other layers without their keys"),
        ("num_hidden_layers", "would leave other layers without their keys and their inputs"),
    ),
    divides=False,
    unit_offset=False,
    release=5,
    refused=REFUSED,
    as_built=as_built,
    unread=unread,
)
