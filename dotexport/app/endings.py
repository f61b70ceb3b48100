"""How a command ends: one sentence and the documented exit code, whatever went wrong."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from dotexport.app.terminal import show_error
from dotexport.errors import DotexportError
from dotexport.version import __version__


def ended(command: Callable[[], object]) -> None:
    """Run a command; what it raises is told in a sentence.

    Raises:
        SystemExit: with the exit code of what went wrong. What nobody foresaw has 1, and its
            traceback lies in a file that the sentence names.
    """
    try:
        command()
    except BrokenPipeError:
        # Nobody reads on; what is left in the buffer would fail once more at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        show_error(_told(error))
        raise SystemExit(getattr(error, "exit_code", DotexportError.exit_code)) from error


def _told(error: Exception) -> str:
    if isinstance(error, DotexportError):
        return str(error)
    if _is_out_of_memory(error):
        return "memory ran out; give fewer --samples, a shorter --seqlen, or --device cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'the system refused'}"
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # as libraries in Rust say it
        return f"{os.strerror(int(number[1]))}: the system refused"
    first = next(iter(str(error).strip().splitlines()), "")
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return (
        f"{said}; dotexport did not expect this, which is a fault of "
        f"its own. The traceback is in {_saved(error)}: please report it with that file"
    )


def _saved(error: Exception) -> Path | str:
    """Where the traceback lies now."""
    lines = traceback.format_exception(error)
    text = f"dotexport {__version__}, Python {sys.version}\n{sys.argv}\n\n{''.join(lines)}"
    try:
        number, name = tempfile.mkstemp(prefix="dotexport-traceback-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError as refused:
        return f"no file, because none could be written ({refused.strerror})"
    return Path(name)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class for the GPU only; on the CPU its allocator says so in words.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = str(error).lower()
    return named or "can't allocate memory" in said or "cannot allocate memory" in said
