"""Which text is read: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.options import option

SOURCES = (
    "A .txt file (documents end in <|endoftext|>), a .jsonl, .json, .csv, .tsv or .parquet file "
    "(field text), a folder of .txt, a dataset id, embedded:calibration or embedded:evaluation."
)

MOST = 1 << 30  # windows, and tokens of one


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which tokens are read.

    Attributes:
        source: a .txt file (documents end in <|endoftext|>, if it has that mark), a .jsonl, .json,
            .csv, .tsv or .parquet file (field "text"; models/documents.py), a folder of .txt
            files, a dataset id of the hub, or `embedded:calibration` and `embedded:evaluation`
            (installed Python sources).
        samples: how many windows, at most.
        seqlen: tokens per window; None is 2048, or the model's context if that is shorter.
        skip: windows left out at the start, so that one file can serve two disjoint purposes.
    """

    source: str = option(help=f"Text. {SOURCES}", flag="text")
    samples: int = option(128, help="Windows of text, at most.")
    seqlen: int | None = option(
        None, help="Tokens per window; default: 2048 or the model's context."
    )
    skip: int = option(0, help="Windows left out at the start of the text.")

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("the text has an empty name; expected a file, a folder or a dataset")
        for name, least in (("samples", 1), ("seqlen", 2), ("skip", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
            if value is not None and value > MOST:
                raise UsageError(f"{name} must be at most {MOST:,}, not {value}")
