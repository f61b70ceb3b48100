"""Text of others in Markdown: a name says itself there, and is never markup."""

from __future__ import annotations

import html
import re
from typing import Any

import yaml

MARKUP = re.compile(r"[\\`*\[\]|]")


class Markup(str):
    """What is Markdown already."""


def front_matter(**fields: Any) -> Markup:
    """The YAML block that a card begins with; fields that are None are left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=float("inf"))
    return Markup(f"---\n{text}---")


def plain(value: Any) -> Any:
    """A text as one line that Markdown and HTML show as it is; anything else stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return Markup(MARKUP.sub(r"\\\g<0>", html.escape(_line(value), quote=False)))


def code(text: str) -> Markup:
    """A text as a code span, which nothing in it ends."""
    line = _line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return Markup(f"{fence}{space}{line}{space}{fence}")


def _line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
