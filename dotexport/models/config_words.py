"""A config.json in words that leave no choice to whoever reads it.

Runtimes, targets and this package read config.json each with rules of their own. So what the stock
class of transformers makes of it is said once, at the door: words that this class ignores and
others obey are left out, and what it takes for granted is written down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.families import table_of
from dotexport.models.family import Family
from dotexport.models.multimodal import language_config, language_names
from dotexport.models.rope import in_all_words, stock_config
from dotexport.models.shapes import read_sizes, slots
from dotexport.models.stacks import Slot

logger = logging.getLogger(__name__)

REMOTE = "auto_map"
# How attention is computed, not what: a kernel that may not be here.
KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
)
# Classes of ours have these or ignore them; whoever reads one that its class ignores has another
# model.
OBEYED = (
    "attention_bias",
    "attention_multiplier",
    "attention_out_bias",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "layer_types",
    "logits_scaling",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "norm_topk_prob",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
    "use_bias",
    "use_sliding_window",
)
# What more than one reader has a default for; those of the classes differ.
TAKEN_FOR_GRANTED = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "hidden_act",
    "logits_scaling",
    "max_position_embeddings",
    "moe_intermediate_size",
    "norm_eps",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "num_key_value_heads",
    "residual_multiplier",
    "rms_norm_eps",
    "tie_word_embeddings",
)
BOTH_WORDS = ("num_experts", "num_local_experts")
# By which classes derive the kinds of layers.
PERIODS = ("full_attention_interval", "full_attn_idxs")


def settled(config: Mapping[str, Any], *, of: object) -> dict[str, Any]:
    """The same model in words that every reader understands alike; of one that sees or hears, its
    language model.

    What is no model of a supported family stays as it is: it is refused elsewhere.

    Args:
        of: the folder, for what is said of it.

    Raises:
        CheckpointError: words that contradict each other.
        UnsupportedModelError: the class is younger than this transformers.
    """
    config = language_config(config)
    family = _family(config)
    if family is None:
        return dict(config)
    check_release(family)
    dropped = dict(_dropped(config, family))
    for key, why in dropped.items():
        if config[key] is not None:
            say_once(f"{of}: {key} in config.json is left out, {why}")
    kept = {key: value for key, value in config.items() if key not in dropped}
    if family.rope_theta is not None:
        kept = {"rope_theta": family.rope_theta} | kept
    words = in_all_words(kept)
    if family.as_built is not None:  # after words that nobody reads are refused
        words = in_all_words(family.as_built(kept))
        family = _family(words) or family  # of a class with two tables, the words say which
    if family.experts_key:
        words = _counted(words)
        words = _counted(words | _granted(words))
    if family.kinds:
        words = _by_layer(words, family)
    return words | _granted(words)


def _by_layer(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """With the kind of every layer, which the class may derive from a period: that would no longer
    be true once layers leave."""
    words = {key: value for key, value in config.items() if key not in PERIODS}
    try:
        said = stock_config(config).layer_types
        return words | {"layer_types": [family.kind(kind) for kind in said]}
    except Exception:  # check_class says what is wrong with it
        return words


def stored_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tensor -> its name in the files, of those that the class does not pass over."""
    family, stored = _family(config), list(names)
    if family is None:
        return {name: name for name in stored}
    known = [name for name in stored if not name.startswith(family.left_out)]
    if len(known) < len(stored):
        starts = ", ".join(f"{start}*" for start in family.left_out)
        say_once(
            f"{len(stored) - len(known)} tensors {starts} are left out, as {family.architecture} "
            "of transformers does"
        )
    unread = family.unread(config) if family.unread else ()
    owned = language_names(known)
    return {own: name for own, name in owned.items() if not own.startswith(unread)}


def stored_slots(config: Mapping[str, Any]) -> dict[str, Slot]:
    """Tensor of an expert -> where it lies in what files have of all experts.

    Raises:
        CheckpointError: config.json does not say how many there are.
    """
    family = _family(config)
    if family is None or not family.stacks:
        return {}
    return slots(family, read_sizes(family, config))


def check_class(config: Mapping[str, Any]) -> None:
    """Refuse what the stock class refuses.

    Raises:
        UnsupportedModelError: its release is too old for our table of it.
        CheckpointError: with what it says; or a window without a width, on which it fails later.
    """
    family, release = _family(config), version("transformers")
    if family is not None and int(release.partition(".")[0]) < family.release:
        raise UnsupportedModelError(
            f"{family.architecture} is narrowed with transformers {family.release} and later, not "
            f"with {release}; pip install 'transformers>={family.release}'"
        )
    try:
        stock = stock_config(config)
    except Exception as error:  # whatever the config class objects to is the answer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise CheckpointError(
            f"transformers refuses config.json ({type(error).__name__}: {reason}); correct it, or "
            "take the config.json that belongs to these weights"
        ) from error
    kinds = getattr(stock, "layer_types", None) or ()
    if "sliding_attention" in kinds and getattr(stock, "sliding_window", None) is None:
        raise CheckpointError(
            "config.json gives layers that attend to a window (layer_types, or by default of the "
            "class) and no sliding_window that is in use; correct one of the two"
        )


def _counted(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the number of experts under both of its names: transformers 4.57 and 5 look for another
    one in Qwen3-MoE, and take their default where it is absent."""
    said = [config[key] for key in BOTH_WORDS if config.get(key) is not None]
    if said and said[0] != said[-1]:
        raise CheckpointError(
            f"config.json gives num_experts = {said[0]} and num_local_experts = {said[-1]}, of "
            "which releases of transformers read one or the other; keep the right one"
        )
    return {**config, **dict.fromkeys(BOTH_WORDS, *said[:1])} if said else dict(config)


def _family(config: Mapping[str, Any]) -> Family | None:
    listed = config.get("architectures") or []
    named = [listed] if isinstance(listed, str) else map(str, listed)
    found = (table_of(name, config) for name in named)
    return next((f for f in found if f and f.model_type == config.get("model_type")), None)


def _dropped(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, str]]:
    """Words that go, and why."""
    if REMOTE in config:
        stock = f"{family.architecture} is a class of transformers: its own code is run"
        yield REMOTE, stock
    for key in KERNELS:
        if key in config:
            yield key, "each runtime has its own way to compute attention"
    for key in config:
        if key.startswith(family.left_out):
            yield key, f"as {family.architecture} of transformers ignores it"
    if "quantization_config" in config and config["quantization_config"] is None:
        yield "quantization_config", "it is null"
    refused = {key for key, _ in family.refused if config.get(key)}
    for key in OBEYED:
        if key in config and key not in _known(family.model_type) | refused:
            yield key, f"as {family.architecture} of transformers ignores it"


@cache
def check_release(family: Family) -> None:
    """Refuse a class that is younger than this transformers."""
    try:
        stock_config({"model_type": family.model_type})
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{family.architecture} is unknown to this release of transformers; "
            "pip install 'transformers>=5'"
        ) from error


@cache
def _known(model_type: str) -> frozenset[str]:
    return frozenset(stock_config({"model_type": model_type}).to_dict())


def _granted(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the class adds of its own."""
    try:
        stock = stock_config(config)
    except Exception:  # check_class says what is wrong with it
        return {}
    said = {key: getattr(stock, key, None) for key in TAKEN_FOR_GRANTED if config.get(key) is None}
    return {key: value for key, value in said.items() if value is not None}


@cache
def say_once(sentence: str) -> None:
    """A folder's config.json is read many times in one run."""
    logger.warning("%s", sentence)
