"""Folders and files that appear whole or not at all.

Everything is written beside its place under a hidden name and renamed when it is complete, so
a killed run, a full disk or an exception never leaves something half that looks finished.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import psutil

from dotexport.errors import DotexportError, UsageError

MANIFEST = "dotexport.json"


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it takes the name `path` when the block ends well.

    Raises:
        UsageError: `path` is taken, is a file, or cannot be made.
        DotexportError: the disk is full.
    """
    path = path.expanduser().resolve()
    partial = _hidden(path, "partial")
    try:
        check_free(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        partial.mkdir()
    except OSError as error:
        _explain_full_disk(error, path)
        raise UsageError(
            f"{path} cannot be made ({error.strerror}: {error.filename}); "
            "give an output folder whose parent is a writable folder"
        ) from error
    try:
        yield partial
        check_free(path, overwrite=overwrite)  # hours may have passed
        _put_in_place(partial, path)
    except BaseException as error:
        written = folder_bytes(partial)
        shutil.rmtree(partial, ignore_errors=True)
        _explain_full_disk(error, path, written=written)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old or the new one, never a piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(path, "partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _explain_full_disk(error, path)
        raise


def write_json(path: Path, obj: Any) -> None:
    """Replace a JSON file in one step. NaN and infinity are refused: JSON has neither."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that `new_folder` could not give to something new.

    Raises:
        UsageError: a file, or a folder with content that may not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; give a folder that does not exist yet")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{path} exists and is not empty; pass --overwrite to replace it, or give another name"
        )
    if not _is_ours(path):
        raise UsageError(
            f"{path} was not written by dotexport (no {MANIFEST}), so --overwrite does not touch "
            "it; give another folder, or empty this one yourself"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_ours(path: Path) -> bool:
    # An output carries the manifest; an artifact lies directly inside such an output.
    return (path / MANIFEST).is_file() or (path.parent / MANIFEST).is_file()


def _hidden(path: Path, role: str) -> Path:
    return path.parent / f".{path.name}.{role}-{os.getpid()}"


def _clear_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`; give back an old output they had set aside."""
    for role in ("old", "partial"):
        for sibling in path.parent.glob(f".{escape(path.name)}.{role}-*"):
            pid = re.fullmatch(r"\d+", sibling.name.rpartition("-")[2])
            if pid is None or _runs_elsewhere(int(pid[0])):
                continue
            if role == "old" and not path.exists():
                sibling.rename(path)
            else:
                shutil.rmtree(sibling, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    # Our own number can only be a leftover: containers hand out the same few numbers again.
    return pid != os.getpid() and psutil.pid_exists(pid)


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = _hidden(path, "old")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explain_full_disk(error: BaseException, path: Path, *, written: int = 0) -> None:
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
