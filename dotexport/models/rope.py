"""The rotary embedding of a config.json in words that every release of transformers reads alike.

Release 5 writes `rope_parameters`. Release 4.57 does not look there: it would take the class's
default base without a word and compute another model. Both read `rope_theta` and `rope_scaling`,
so these are said as well, in what is written and in what is handed to a class.

Where the words disagree, release 5 decides (`modeling_rope_utils.py`): `rope_scaling` replaces
`rope_parameters`, base and all; what is in the one that wins replaces `rope_theta` and
`partial_rotary_factor` beside it, and `original_max_position_embeddings` beside it replaces the one
that is in there. Gemma 3 alone adds `rope_scaling` to what is said of full
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from dotexport.errors import CheckpointError

# Release 5 keeps these among the parameters; before, they had keys of their own.
TOP_LEVEL = ("rope_theta", "partial_rotary_factor")
# The context before a model was stretched beyond it, for types that ask for it.
ORIGINAL, STRETCHED = "original_max_position_embeddings", ("llama3", "yarn", "longrope")
# Sets of their own for two kinds of layers.
BY_KIND = "gemma3_text"
# Of release 5, which reads their sets alone.
NEW_WORDS = ("gemma4_text",)


def in_all_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with words for its rotary embedding that agree.

    Raises:
        CheckpointError: words that transformers does not read, or its releases read differently.
    """
    parameters, scaling = (_said(config, key) for key in ("rope_parameters", "rope_scaling"))
    if config.get("model_type") in NEW_WORDS:
        return dict(config)
    if "full_attention" in parameters or config.get("model_type") == BY_KIND:
        return _by_kind(config, parameters, scaling)
    if not parameters and not scaling:
        return dict(config)
    top = {key: config[key] for key in TOP_LEVEL if key in config}
    rope = top | _one_type(scaling or parameters)
    if ORIGINAL in config and rope_type(rope) in STRETCHED:
        rope[ORIGINAL] = config[ORIGINAL]
    # Old words alone are read by both, but where a class has a scaled one of its own (gpt-oss), and
    # they say the plain one by saying nothing.
    newer = {"rope_parameters": rope} if parameters or rope_type(rope) == "default" else {}
    return {**config, **newer, **_older(rope)}


def _by_kind(
    config: Mapping[str, Any], parameters: Mapping[str, Any], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    """Of a class with a set for layers that see everything, and one for those with a window."""
    if not parameters and not scaling:
        return dict(config)
    if parameters and scaling and not parameters.get("full_attention"):
        raise CheckpointError(
            "config.json gives rope_scaling beside rope_parameters without full_attention, which "
            "it would belong to; keep one of the two"
        )
    for kind in ("full_attention", "sliding_attention"):
        if not isinstance(parameters.get(kind) or {}, Mapping):
            raise CheckpointError(f"config.json gives rope_parameters of {kind} that are no object")
    # In release 5 the type is there before rope_scaling comes: one under its old name is lost.
    said = parameters.get("full_attention") or {}
    full = _one_type({"rope_type": "default", **said, **scaling})
    local = _one_type(parameters.get("sliding_attention") or {"rope_type": "default"})
    for rope, key in ((full, "rope_theta"), (local, "rope_local_base_freq")):
        if key in config:
            rope.setdefault("rope_theta", config[key])
    words = _older(full)
    if "rope_theta" in local:
        words["rope_local_base_freq"] = local["rope_theta"]
    newer = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    return {**config, **(newer if parameters else {}), **words}


def _said(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"config.json gives {key} = {found!r}; expected an object with rope_type"
        )
    return found


def _one_type(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters, which have one type: `type` is the old name of `rope_type`."""
    old, new = rope.get("type"), rope.get("rope_type")
    if old and new and old != new:
        raise CheckpointError(
            f"config.json calls its rotary embedding both rope_type = {new!r} and type = {old!r}, "
            "of which releases of transformers read one or the other; keep the right one"
        )
    return dict(rope) if old or new else {**rope, "rope_type": "default"}


def _older(rope: Mapping[str, Any]) -> dict[str, Any]:
    top = {key: rope[key] for key in TOP_LEVEL if key in rope}
    scaled = rope_type(rope) != "default"
    scaling = {k: v for k, v in rope.items() if k not in TOP_LEVEL} if scaled else None
    return {**top, "rope_scaling": scaling}


def rope_type(rope: Mapping[str, Any]) -> str:
    """Of a set of parameters; old files say `type`."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def stock_config(config: Mapping[str, Any]) -> Any:
    """The config object of transformers for a config.json, read alike by every release.

    Raises:
        ValueError, KeyError: transformers knows no such model_type, or its class objects.
    """
    from transformers import AutoConfig

    settings = deepcopy(in_all_words(config))  # the class writes into what it is given
    return AutoConfig.for_model(settings.pop("model_type", ""), **settings)
