"""The rotary embedding of a config.json in words that every release of transformers reads.

Release 5 writes `rope_parameters`. Release 4.57 does not look there: it would take the class's
default base without a word and compute another model. Both read `rope_theta` and `rope_scaling`,
so these are said as well, in what is written and in what is handed to a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# Release 5 keeps these among the parameters; before, they had keys of their own.
TOP_LEVEL = ("rope_theta", "partial_rotary_factor")


def in_all_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with `rope_theta` and `rope_scaling` beside `rope_parameters`."""
    said = config.get("rope_parameters")
    if not said:
        return dict(config)
    if "full_attention" in said:  # one set per type of layer: Gemma 3
        local = said.get("sliding_attention") or {}
        words = _older(said["full_attention"] or {})
        if "rope_theta" in local:
            words["rope_local_base_freq"] = local["rope_theta"]
        return {**config, **words}
    return {**config, **_older(said)}


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
