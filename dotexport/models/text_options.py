"""Which text is read: what can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dotexport.errors import UsageError
from dotexport.options import option

SOURCES = (
    "A .txt file (documents end in <|endoftext|>), a .jsonl, .json, .csv, .tsv or .parquet file "
    "(field text), a folder of .txt, a dataset id, embedded:calibration or embedded:evaluation."
)

MIXED = (
    "self is text that the original samples itself. Several with commas between them are mixed by "
    "windows, by weight where one stands behind: text.txt=3,self=1."
)
SELF = "self"

MOST = 1 << 30  # windows, and tokens of one


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which tokens are read.

    Attributes:
        source: a .txt file (documents end in <|endoftext|>, if it has that mark), a .jsonl, .json,
            .csv, .tsv or .parquet file (field "text"; models/documents.py), a folder of .txt
            files, a dataset id of the hub, or `embedded:calibration` and `embedded:evaluation`
            (installed Python sources). Several are mixed (`parts_of`).
        own: the file that `self` among them stands for (generation/own_text.py).
        samples: how many windows, at most.
        seqlen: tokens per window; None is 2048, or the model's context if that is shorter.
        skip: windows left out at the start, so that one file can serve two disjoint purposes.
        every: of the windows of a source one in so many is taken, so that as many see more of a
            text whose neighbouring windows are of one kind; not of what the original samples. None:
            calibration text is of all of it (`spread`), what judges is its first windows.
    """

    source: str = option(help=f"Text. {SOURCES}", flag="text")
    samples: int = option(128, help="Windows of text, at most.")
    seqlen: int | None = option(
        None, help="Tokens per window; default: 2048 or the model's context."
    )
    skip: int = option(0, help="Windows left out at the start of the text.")
    every: int | None = option(
        None,
        help="Of a long text take one window in so many: as many windows then see more of it.",
    )
    own: str | None = None

    def __post_init__(self) -> None:
        parts_of(self.source)
        for name, least in (("samples", 1), ("seqlen", 2), ("skip", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
            if value is not None and value > MOST:
                raise UsageError(f"{name} must be at most {MOST:,}, not {value}")


@dataclass(frozen=True)
class Part:
    """One source of a mix; its windows are `weight` over the sum of all weights of those read."""

    source: str
    weight: float = 1.0


def parts_of(source: str) -> tuple[Part, ...]:
    """What a source is mixed from; one that exists under its whole name is one.

    >>> parts_of("text.jsonl=3,self")
    (Part(source='text.jsonl', weight=3.0), Part(source='self', weight=1.0))

    Raises:
        UsageError: an empty name, a weight that is not positive, or one source twice.
    """
    parts = tuple(map(_part, [source] if _exists(source) else source.split(",")))
    names = [part.source for part in parts]
    if not all(names):
        raise UsageError(
            f"the text {source!r} has an empty name; expected a file, a folder or a dataset, or "
            "several with commas between them"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the text {source!r} names {twice[0]} twice; give it a weight: NAME=2")
    return parts


def _part(said: str) -> Part:
    name, equals, weight = said.rpartition("=")
    if not equals or _exists(said):
        return Part(said)
    try:
        number = float(weight)
    except ValueError:  # it belongs to the name
        return Part(said)
    if not 0 < number < math.inf:
        raise UsageError(f"the weight of {name} must be positive, not {weight}")
    return Part(name, number)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # no name of a file at all
        return False
