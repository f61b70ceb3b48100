"""An option of a verb, declared once: a field of a frozen class, with its help beside it.

The command line (app/flags.py), recipes and plans read these declarations, and the classes check
themselves when they are made. A field is one flag (`option`), the flags of another class (`group`),
or one flag for each of some things, such as the axes (`each`). Other fields are no flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

from dotexport.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """One flag as the command line and recipes see it.

    Attributes:
        key: in a recipe, and with hyphens on the command line.
        name: what the class calls it.
        kind: its type, `int | None` for one that may be left out.
        default: MISSING for one that must be given.
        words: on the command line where they are not `--key`, such as `--tied/--untied`.
        panel: of the help that it stands in.
    """

    key: str
    name: str
    kind: Any
    help: str
    default: Any = MISSING
    words: tuple[str, ...] = ()
    panel: str | None = None


def option(
    default: Any = MISSING,
    *,
    help: str,
    flag: str | None = None,
    words: tuple[str, ...] = (),
    panel: str | None = None,
) -> Any:
    """A field that is a flag, `flag` its key where that is not the field's name."""
    meta = {"help": help, "flag": flag, "words": words, "panel": panel}
    return dataclasses.field(default=default, metadata=meta)


def check_least(given: Any, **least: float) -> None:
    """Refuse values of an option class that are too small, by field.

    Raises:
        UsageError: one is.
    """
    for name, bound in least.items():
        if (value := getattr(given, name)) < bound:
            raise UsageError(f"--{name} must be at least {bound}, not {value}")


def group(default: Callable[[], Any] | None = None, **changes: Mapping[str, Any]) -> Any:
    """A field of another option class, whose flags join these.

    Args:
        default: makes it where nothing is given; None: it must be given.
        changes: name of a field there -> what its `Flag` says differently here.
    """
    meta = {"group": changes}
    if default is None:
        return dataclasses.field(metadata=meta)
    return dataclasses.field(default_factory=default, metadata=meta)


def each(flags: Callable[[], Iterable[Flag]]) -> Any:
    """A mapping that holds one number for each of these flags, by the flag's name."""
    return dataclasses.field(default_factory=dict, metadata={"each": flags})


def flags_of(kind: type) -> list[Flag]:
    """All flags of an option class, in the order of its fields."""
    return [flag for _, flags in _parts(kind) for flag in flags]


def build(kind: type[T], **given: Any) -> T:
    """The option class from values by key; what is not given takes its default.

    Raises:
        TypeError: a flag that must be given is not there, or a key is no flag.
        DotexportError: whatever the class refuses.
    """
    known = {flag.key for flag in flags_of(kind)}
    if strange := set(given) - known:
        raise TypeError(f"{kind.__name__} has no option {sorted(strange)[0]!r}")
    made = {}
    for field, flags in _parts(kind):
        values = {flag.name: given.get(flag.key, flag.default) for flag in flags}
        if missing := [name for name, value in values.items() if value is MISSING]:
            raise TypeError(f"{kind.__name__} needs {missing[0]!r}")
        if "each" in field.metadata:
            made[field.name] = {name: v for name, v in values.items() if v is not None}
        elif "group" in field.metadata:
            inner = _hints(kind)[field.name]
            keys = {flag.name: flag.key for flag in flags_of(inner)}
            made[field.name] = build(inner, **{keys[name]: v for name, v in values.items()})
        else:
            made[field.name] = values[field.name]
    return kind(**made)


def values_of(options: Any) -> dict[str, Any]:
    """Key of every flag -> its value, from which `build` makes the same options."""
    found: dict[str, Any] = {}
    for field, flags in _parts(type(options)):
        held = getattr(options, field.name)
        if "each" in field.metadata:
            found |= {flag.key: held.get(flag.name) for flag in flags}
        elif "group" in field.metadata:
            inner = values_of(held)
            keys = {flag.name: flag.key for flag in flags_of(type(held))}
            found |= {flag.key: inner[keys[flag.name]] for flag in flags}
        else:
            found[flags[0].key] = held
    return found


def _parts(kind: type) -> Iterable[tuple[dataclasses.Field[Any], list[Flag]]]:
    """The fields that are flags, each with those it stands for."""
    hints = _hints(kind)
    for field in fields(kind):
        meta = field.metadata
        if "each" in meta:
            yield field, list(meta["each"]())
        elif "group" in meta:
            inner = flags_of(hints[field.name])
            yield field, [replace(flag, **meta["group"].get(flag.name, {})) for flag in inner]
        elif "help" in meta:
            key, name = meta["flag"] or field.name, field.name
            said = (meta["help"], field.default, meta["words"], meta["panel"])
            yield field, [Flag(key, name, hints[name], *said)]


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
