"""Flags of a verb from the option classes that it takes (options.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from dotexport.options import Flag, build, flags_of

Verb = Callable[..., None]


def with_options(verb: Verb) -> Verb:
    """The verb with every parameter that is an option class taken apart into flags.

    A flag that the verb has as a parameter of its own is not repeated; the option class then has
    its default, and the verb says what the parameter is for.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters = inspect.signature(verb).parameters
    groups = {name: hints[name] for name in parameters if is_dataclass(hints[name])}
    taken: dict[str, list[Flag]] = {
        name: [flag for flag in flags_of(kind) if flag.key not in parameters]
        for name, kind in groups.items()
    }

    def called(**values: Any) -> None:
        for name, kind in groups.items():
            given = {flag.key: _value(flag, values.pop(flag.key)) for flag in taken[name]}
            values[name] = build(kind, **given)
        verb(**values)

    shown = []
    for name, parameter in parameters.items():
        if name in groups:
            shown += [_parameter(flag) for flag in taken[name]]
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            shown.append(parameter.replace(kind=keyword, annotation=hints[name]))
    called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    called.__doc__, called.__name__ = verb.__doc__, verb.__name__
    return called


def _parameter(flag: Flag) -> inspect.Parameter:
    kind, default = flag.kind, flag.default
    if _is_list(flag):
        kind, default = list[str] | None, None
    option = typer.Option(*flag.words, help=flag.help, rich_help_panel=flag.panel)
    return inspect.Parameter(
        flag.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, option],
    )


def _is_list(flag: Flag) -> bool:
    return bool(flag.kind == tuple[str, ...])


def _value(flag: Flag, given: Any) -> Any:
    return tuple(given or ()) if _is_list(flag) else given
