"""What one process tells another: JSON, with tensors beside it. Nothing that could run is sent:
of a dataclass its name, which must be one of ours, and its fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS = "dotexport."
KIND = "kind"  # what marks a dict of ours; dicts of users travel as pairs


def packed(value: Any) -> tuple[str, list[Tensor]]:
    """A value as JSON, in which tensors are numbers of those beside it."""
    tensors: list[Tensor] = []
    return json.dumps(_apart(value, tensors)), tensors


def unpacked(said: str, tensors: list[Tensor]) -> Any:
    """What `packed` was given."""
    return _together(json.loads(said), tensors)


def _apart(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (tuple, list, frozenset):
        return {KIND: type(value).__name__, "items": [_apart(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        pairs = [[_apart(key, tensors), _apart(item, tensors)] for key, item in value.items()]
        return {KIND: "dict", "items": pairs}
    if isinstance(value, Tensor | np.ndarray):
        tensors.append(
            torch.as_tensor(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        )
        return {KIND: "tensor" if isinstance(value, Tensor) else "array", "number": len(tensors)}
    if isinstance(value, Path):
        return {KIND: "path", "path": str(value)}
    if is_dataclass(value):
        name = _name(value if isinstance(value, type) else type(value))
        given = {f.name: _apart(getattr(value, f.name), tensors) for f in fields(value) if f.init}
        return {KIND: "ours", "name": name, "fields": given}
    if callable(value):
        return {KIND: "function", "name": _name(value)}
    raise TypeError(f"{type(value).__name__} is nothing that processes tell each other")


def _name(of: Any) -> str:
    assert of.__module__.startswith(OURS), of
    return f"{of.__module__}:{of.__qualname__}"


def _together(said: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(said, dict):
        return said
    make: dict[str, Callable[[], Any]] = {
        "tuple": lambda: tuple(_together(item, tensors) for item in said["items"]),
        "list": lambda: [_together(item, tensors) for item in said["items"]],
        "frozenset": lambda: frozenset(_together(item, tensors) for item in said["items"]),
        "dict": lambda: dict([_together(part, tensors) for part in p] for p in said["items"]),
        "tensor": lambda: tensors[said["number"] - 1],
        "array": lambda: tensors[said["number"] - 1].cpu().numpy(),
        "path": lambda: Path(said["path"]),
        "function": lambda: _ours(said["name"]),
        "ours": lambda: _ours(said["name"])(
            **{name: _together(value, tensors) for name, value in said["fields"].items()}
        ),
    }
    return make[said[KIND]]()


def _ours(name: str) -> Any:
    assert name.startswith(OURS), name
    return resolve_name(name)
