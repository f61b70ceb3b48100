"""What mlx-lm reads in a config.json: which models it computes as transformers does.

Its classes are their own, one file each in mlx_lm/models. What a class does not read there it does
not compute, without a word, so everything that would be passed over is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from dotexport.models.rope import in_all_words, stock_config

from .configs import head_dim, rope_type, rope_words, window_of

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "GraniteForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Olmo2ForCausalLM",
)
GEMMAS = ("gemma2", "gemma3_text")
ROPES = {"default", "linear", "yarn", "llama3"}
PLAIN_ROPE = ("gemma2", "phi3")  # classes that read no scaling, or another one
WITHOUT_BIASES = ("qwen3", *GEMMAS)
SQUARE = ("qwen2", "phi3", "granite")  # classes that divide the width by the heads
YARN_OWN = ("attention_factor", "mscale", "mscale_all_dim")
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
# Of classifiers, and what mlx_lm.convert leaves out.
OF_OTHERS = {"_name_or_path", "id2label", "label2id", "problem_type"}
GROUPS = (64, 32)  # of a row that MLX rounds together; the first is mlx_lm.convert's own


def group_size(rows: Iterable[int]) -> int:
    """The largest group that fills all rows, else the smallest."""
    widths = list(rows)
    return next((group for group in GROUPS if all(w % group == 0 for w in widths)), GROUPS[-1])


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the words of mlx-lm: every default said, for its classes have others."""
    full = json.loads(stock_config(config).to_json_string(use_diff=False))
    words = in_all_words({key: value for key, value in full.items() if key not in OF_OTHERS})
    words["tie_word_embeddings"] = bool(words["tie_word_embeddings"])
    if rope_type(config) == "yarn":
        context = words["max_position_embeddings"]
        words["rope_scaling"].setdefault("original_max_position_embeddings", context)
    if _carried_by_llama(config):  # which mlx-lm also calls mistral, as transformers takes it
        words |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        words |= {"sliding_window": None}
    if words["model_type"] == "gemma3_text":
        words["sliding_window_pattern"] = _period(words["layer_types"])
    return words


def query_scale(config: Mapping[str, Any]) -> float:
    """What queries are multiplied with: a class that scales scores by its own rule divides by the
    root of the heads' width in mlx-lm."""
    if not _carried_by_llama(config):
        return 1.0
    return float(config.get("attention_multiplier", 1.0)) * math.sqrt(head_dim(config))


def stream_scale(config: Mapping[str, Any]) -> float:
    """How much larger mlx-lm makes the embedding than transformers.

    That of Gemma 3 is multiplied with sqrt(hidden_size) in bfloat16. If all that is added to the
    stream is larger by the same factor, no norm that reads it sees a difference.
    """
    if config.get("model_type") != "gemma3_text":
        return 1.0
    root = math.sqrt(config["hidden_size"])
    rounded: Any = mx.array(root).astype(mx.bfloat16).item()
    return float(rounded) / root


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Every reason why mlx-lm would not compute this model."""
    architecture, kind = (config.get("architectures") or ["none"])[0], config.get("model_type")
    if architecture not in ARCHITECTURES:
        yield (
            f"architecture {architecture} is not written for MLX; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
        return
    yield from _rope_problems(config)
    yield from _head_problems(config)
    yield from _window_problems(config)
    if kind in WITHOUT_BIASES and config.get("attention_bias"):
        yield f"attention_bias has no place in mlx-lm's {kind}; export with another target"
    if kind in GEMMAS:
        yield from _gemma_problems(config)
    elif config.get("hidden_act", "silu") != "silu":
        yield (
            f"hidden_act {config['hidden_act']!r} is not what mlx-lm computes for this "
            "architecture, silu; export it with another target"
        )
    if config.get("quantization_config"):
        yield (
            "the weights are stored quantised (quantization_config); export the model they were "
            "made from"
        )


def _rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    rope, scaled = rope_words(config), rope_type(config)
    if scaled not in ROPES:
        yield (
            f"rope_type {scaled!r} is not written for MLX; expected one of "
            f"{', '.join(sorted(ROPES))}"
        )
    elif scaled != "default" and config.get("model_type") in PLAIN_ROPE:
        yield (
            f"rope_type {scaled!r} is passed over by mlx-lm's {config['model_type']}; export with "
            "another target"
        )
    own = {key: rope[key] for key in YARN_OWN if rope.get(key) is not None}
    if rope.get("truncate") is False:
        own["truncate"] = False
    if scaled == "yarn" and own:
        yield f"yarn with {own} is not what mlx-lm computes; export with another target"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor: this target rotates whole heads; export with another target"


def _head_problems(config: Mapping[str, Any]) -> Iterator[str]:
    heads, width = config.get("num_attention_heads") or 1, config.get("hidden_size") or 0
    if config.get("model_type") in SQUARE and not _is_square(config):
        if _carried_by_llama(config):
            return
        yield (
            f"hidden_size {width} is not {heads} heads of head_dim {head_dim(config)}, which "
            f"mlx-lm's {config['model_type']} takes it for; narrow it with `dotexport shrink`, "
            "which writes a class that has a place for them, or keep the width"
        )


def _window_problems(config: Mapping[str, Any]) -> Iterator[str]:
    window, context = window_of(config), config.get("max_position_embeddings") or 0
    kind = config.get("model_type")
    if kind == "gemma3_text":
        kinds = config.get("layer_types") or stock_config(config).layer_types
        if _period(kinds) is None:
            yield (
                f"layer_types {', '.join(kinds)} do not repeat with one layer of full_attention at "
                "the end, as mlx-lm has it; keep the original's layers"
            )
    elif window and window < context:
        yield (
            f"sliding_window {window} is passed over by mlx-lm's {kind}, which attends to all; "
            f"lower max_position_embeddings from {context} to {window}"
        )


def _gemma_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind, full = config["model_type"], stock_config(config)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(full, cap, None)
        if (value is None) == (kind == "gemma2"):
            yield f"{cap} {value} is not what mlx-lm's {kind} computes; export with another target"
    if not full.tie_word_embeddings:
        yield f"a head of its own has no place in mlx-lm's {kind}; export with another target"
    if (act := full.hidden_activation) != "gelu_pytorch_tanh":
        yield (
            f"hidden_activation {act!r} is not what mlx-lm computes for this architecture, "
            "gelu_pytorch_tanh; export it with another target"
        )


def _is_square(config: Mapping[str, Any]) -> bool:
    return bool(head_dim(config) * config["num_attention_heads"] == config["hidden_size"])


def _carried_by_llama(config: Mapping[str, Any]) -> bool:
    """Whether it is a Granite that only mlx-lm's Llama, with heads of any width, can hold."""
    neutral = all(config.get(key, 1.0) == 1.0 for key in MULTIPLIERS)
    return config.get("model_type") == "granite" and neutral and not _is_square(config)


def _period(kinds: Sequence[str]) -> int | None:
    """Layers from one of full attention to the next, the rest having windows; None: not so."""
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    wanted = ["sliding_attention"] * (period - 1) + ["full_attention"]
    repeats = period and all(kind == wanted[i % period] for i, kind in enumerate(kinds))
    return period if repeats else None
