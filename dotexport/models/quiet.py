"""Bars and advice of other libraries, hushed while they are asked for a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(*others: Any) -> Iterator[None]:
    """No bars and advice of transformers, nor of libraries whose `utils.logging` is given."""
    import transformers.utils.logging as theirs

    libraries: tuple[Any, ...] = (theirs, *others)
    before = [(at.is_progress_bar_enabled(), at.get_verbosity()) for at in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (shown, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()
