"""A plan in a file: what `plan --json` prints is what `shrink --plan` takes.

A plan belongs to one model: it carries a fingerprint of the config.json that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dotexport.axes import axes_of
from dotexport.axes.plan import Plan, SizeOptions, read_model
from dotexport.errors import UsageError
from dotexport.options import build
from dotexport.sizes.budget import plan
from dotexport.storage.reading import read_json
from dotexport.storage.schema import validated

logger = logging.getLogger(__name__)

KEY = "shrink"
"""Of the plan: flags of shrink that give its sizes, spelled as the keys of a recipe."""

SWITCHES = ("tied", "bias", "keep_class", "square")
VOCABULARY = {"vocab": int, "vocab_for": str, "keep_tokens": str}
EXPECTED = "expected what `dotexport plan MODEL ... --json` prints for this model"


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a config.json says, however it is laid out."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def as_flags(decided: Plan, asked: SizeOptions) -> dict[str, Any]:
    """Flags of shrink that give the sizes of a plan."""
    flags: dict[str, Any] = {
        axis.flag: axis.size(decided.after) for axis in axes_of(decided.before)
    }
    if decided.before.tied and not decided.after.tied:
        flags["tied"] = False
    return flags | {name: True for name in SWITCHES[1:] if getattr(asked, name)}


def on_a_command_line(flags: Mapping[str, Any]) -> str:
    """The same as people type them."""
    words = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if type(value) in (int, str):
            words.append(f"{flag} {shlex.quote(str(value))}")
        elif value or name == "tied":  # the others are off where nobody names them
            words.append(flag if value else "--untied")
    return " ".join(words)


def read_plan(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of shrink, as keys of a recipe, from the plan of this very model.

    Raises:
        UsageError: not a plan, a plan of another model, or one whose sizes no longer come to what
            it says of them.
        CheckpointError: not a JSON object.
        SizeError: sizes that were edited into impossible ones.
    """
    if not file.is_file():
        raise UsageError(f"--plan {file}: no such file; {EXPECTED}")
    content = read_json(file, advice=EXPECTED)
    axes = tuple(axis.flag for axis in axes_of(read_model(config)[1]))
    validated(_document(axes), content, f"{file} is no plan", error=UsageError, advice=EXPECTED)
    flags: dict[str, Any] = content[KEY]
    if content.get("config_sha256") != fingerprint(config):
        raise UsageError(
            f"{file} was made for another model: its config.json is not the one here; {EXPECTED}"
        )
    sizes = build(SizeOptions, **{k: v for k, v in flags.items() if k not in VOCABULARY})
    asked = replace(sizes, vocab_size=flags.get("vocab"))
    told, found = content["parameters"], plan(config, asked).as_dict()["parameters"]
    if told != found:
        raise UsageError(
            f"{file} says {told} for parameters before and after, and its sizes give {found}: it "
            f"was edited, or another version made it; {EXPECTED}"
        )
    for sentence in content.get("frozen", ()):
        logger.warning("%s", sentence)
    return flags


@cache
def _document(axes: tuple[str, ...]) -> Any:
    """What a plan must hold: a size of every axis, the switches that are on, and which tokens
    stay."""
    from pydantic import create_model

    strict: Any = {"extra": "forbid", "strict": True}
    sizes: dict[str, Any] = dict.fromkeys(axes, (int, ...))
    switches: dict[str, Any] = dict.fromkeys(SWITCHES, (bool, False))
    tokens: dict[str, Any] = {name: (kind, None) for name, kind in VOCABULARY.items()}
    flags = create_model("Flags", __config__=strict, **sizes, **switches, **tokens)
    fields: dict[str, Any] = {
        KEY: (flags, ...),
        "config_sha256": (str, ...),
        "parameters": (list[int], ...),
        "frozen": (list[str], []),
    }
    return create_model("PlanFile", __config__={"extra": "allow", "strict": True}, **fields)
