"""JSON and YAML that people hand us, read within bounds.

Nothing that walks through a document has to fear it: bytes, depth and the number of values are
bounded, text can be written again, and a YAML alias that leads back to itself, or to a billion
values, is told by these bounds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from dotexport.errors import CheckpointError, UsageError

JSON_BYTES = 64 << 20  # a sweep with every sample of it has a few megabytes
YAML_BYTES = 1 << 20
DEPTH = 64
YAML_VALUES = 100_000
JSON_VALUES = 20_000_000

# PyYAML's constructors raise whatever Python makes of a value: a 13th month, `!!bool maybe`.
NOT_YAML = (
    *(yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError),
    *(RecursionError, OverflowError),
)


class UnreadableError(ValueError):
    """A document is not what its kind says, or is beyond the bounds; the text says which."""


def read_json(path: Path, *, advice: str, finite: bool = False) -> dict[str, Any]:
    """A JSON object from a file; `advice` is what to do about one that is damaged.

    Args:
        finite: refuse NaN and infinity, which JSON itself does not have.

    Raises:
        CheckpointError: not JSON, not an object, or beyond the bounds.
    """
    try:
        content = parse_json(_text(path, JSON_BYTES), finite=finite)
    except UnreadableError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not a {type(content).__name__}; {advice}"
        )
    return content


def read_yaml(file: Path, *, what: str) -> Any:
    """What a YAML file holds; `what` it is, for messages.

    Raises:
        UsageError: it cannot be read, is not YAML, or is beyond the bounds.
    """
    try:
        return parse_yaml(_text(file, YAML_BYTES))
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}") from error
    except UnreadableError as error:
        raise UsageError(f"{what} is not YAML: {error}") from error


def parse_json(text: str, *, finite: bool = False) -> Any:
    """A JSON document; see `read_json`.

    Raises:
        UnreadableError: it is none, or is beyond the bounds.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UnreadableError(_too_deep()) from error
    except ValueError as error:
        raise UnreadableError(str(error)) from error
    _check(content, JSON_VALUES, finite=finite)
    return content


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values.

    Raises:
        UnreadableError: it is none, or is beyond the bounds.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise UnreadableError(_too_deep()) from error
    except NOT_YAML as error:
        raise UnreadableError(str(error)) from error
    _check(content, YAML_VALUES)
    return content


def brief(value: Any, length: int = 200) -> str:
    """A value for a message, on one line of bounded length."""
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[:length]}..."


def _text(path: Path, most: int) -> str:
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise UnreadableError(f"it has more than {most >> 20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error


def _check(content: Any, most: int, *, finite: bool = False) -> None:
    left, count = [(content, 1)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEPTH:
            raise UnreadableError(_too_deep())
        if count > most:
            raise UnreadableError(f"it holds more than {most:,} values")
        if isinstance(value, str):
            _check_text(value)
        elif finite and isinstance(value, float) and not math.isfinite(value):
            raise UnreadableError(f"a number in it is {value}")
        elif isinstance(value, dict):
            left.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list | tuple | set):
            left.extend((part, depth + 1) for part in value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(
            f"a text in it holds half of a surrogate pair, {text[error.start]!r}"
        ) from error


def _too_deep() -> str:
    return f"it is nested more than {DEPTH} deep"
