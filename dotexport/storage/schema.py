"""What a document must look like, said once as a pydantic model and held at the door.

Whoever reads a document further in relies on its model and asks nothing twice. pydantic is imported
when the first document is read: starting is light.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from dotexport.errors import DotexportError
from dotexport.storage.reading import brief

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")


def validated(
    kind: type[T], content: Any, where: str, *, error: type[DotexportError], advice: str
) -> T:
    """The content as its model (any type that pydantic knows) reads it.

    Raises:
        error: what the model refuses first, by its place in `where`, and `advice`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as refused:
        first = refused.errors(include_url=False)[0]
        raise error(f"{where}: {in_words(first)}; {advice}") from refused


def in_words(refused: ErrorDetails) -> str:
    """What pydantic has against a value, with its place and the value."""
    place = in_place(refused["loc"])
    if refused["type"] == "missing":
        return f"{place} is not there"
    message = refused["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("should", "must", 1)
    start = f"{place}: {message}" if message[:1].isupper() else f"{place} {message}"
    return f"{start}, not {brief(refused['input'], 80)}"


def in_place(parts: Iterable[int | str]) -> str:
    """A path into a document: `artifacts.hf.files`."""
    return ".".join(map(str, parts)) or "it"
