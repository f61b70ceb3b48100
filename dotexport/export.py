"""The export verb: write artifacts of a stock checkpoint, each kept only if it proves exact.

What a target is stands in adapter.py; its names can be imported from here as well.
"""

from __future__ import annotations

from dotexport.adapter import (
    Logits,
    Session,
    Target,
    TargetRow,
    Tokens,
    find_target,
    list_targets,
    parse_spec,
    resolve,
    target_names,
)

__all__ = [
    "Logits",
    "Session",
    "Target",
    "TargetRow",
    "Tokens",
    "find_target",
    "list_targets",
    "parse_spec",
    "resolve",
    "target_names",
]
