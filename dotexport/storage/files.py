"""Files that appear whole or not at all: written beside their place and renamed when complete."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from dotexport.errors import DotexportError

MANIFEST = "dotexport.json"


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old or the new one, never a piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden(path, "partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        explain_full_disk(error, path)
        raise


def write_json(path: Path, obj: Any) -> None:
    """Replace a JSON file in one step. NaN and infinity are refused: JSON has neither."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def hidden(path: Path, role: str) -> Path:
    """A name beside `path` that nobody else has taken."""
    return path.parent / f".{path.name}.{role}-{secrets.token_hex(6)}"


def explain_full_disk(error: BaseException, path: Path, *, written: int = 0) -> None:
    """Raise the error a user can act on, if this one means that the disk is full."""
    if not _means_full_disk(error):
        return
    parent = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    raise DotexportError(
        f"the disk that holds {parent} is full: {written / 1e9:.2f} GB of {path.name} were written "
        f"and removed again, {free / 1e9:.2f} GB are free now; free more, or write to another disk"
    ) from error


def _means_full_disk(error: BaseException) -> bool:
    # safetensors reports the system's error inside its text, not as an OSError.
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return numbered or "No space left on device" in str(error)
