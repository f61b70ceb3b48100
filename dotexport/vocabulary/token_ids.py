"""Token ids in the files of a model: which there are, and the same files with other ids.

One walk does both: `change` is asked for every id and says what stands there afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Change = Callable[[int], int]

NAMED = re.compile(
    r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|stop_token_ids"
)
"""Keys of config.json and generation_config.json whose numbers are all ids."""


def in_config(config: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Of config.json or generation_config.json; ids stand alone, in lists, and in lists of them."""
    return {key: _value(key, value, change) for key, value in config.items()}


def _value(key: str, value: Any, change: Change) -> Any:
    if NAMED.fullmatch(key):
        return _all(value, change)
    if key == "forced_decoder_ids" and value:  # a place, and the token there
        return [[place, _all(token, change)] for place, token in value]
    if key == "sequence_bias" and value:  # tokens, and what is added to the last one's logit
        return [[_all(tokens, change), bias] for tokens, bias in value]
    return in_config(value, change) if isinstance(value, Mapping) else value


def _all(value: Any, change: Change) -> Any:
    if isinstance(value, list):
        return [_all(one, change) for one in value]
    return change(value) if type(value) is int else value


def in_tokenizer(content: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Of tokenizer.json besides its section `model`: added tokens, what is put around a text, and
    padding."""
    added = [{**entry, "id": change(entry["id"])} for entry in content.get("added_tokens") or ()]
    padding = content.get("padding")
    if padding and "pad_id" in padding:
        padding = {**padding, "pad_id": change(padding["pad_id"])}
    around = _around(content.get("post_processor"), change)
    return {**content, "added_tokens": added, "padding": padding, "post_processor": around}


def _around(step: Any, change: Change) -> Any:
    """A post-processor, or several in a row."""
    if not isinstance(step, Mapping):
        return step
    found = dict(step)
    if "processors" in step:
        found["processors"] = [_around(one, change) for one in step["processors"]]
    if "special_tokens" in step:  # TemplateProcessing
        found["special_tokens"] = {
            name: {**entry, "ids": _all(entry["ids"], change)}
            for name, entry in step["special_tokens"].items()
        }
    for key in ("sep", "cls"):  # BERT's and RoBERTa's own
        if key in step:
            text, number = step[key]
            found[key] = [text, change(number)]
    return found
