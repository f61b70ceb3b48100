"""Output folders that appear whole or not at all, one writer at a time.

Everything is written beside its place under a hidden name and renamed when it is complete, so
a killed run, a full disk or an exception never leaves something half that looks finished.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

from dotexport.errors import UsageError
from dotexport.storage.files import MANIFEST, explain_full_disk, hidden
from dotexport.storage.locking import TakenError, locked
from dotexport.storage.ownership import foreign_files


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it takes the name `path` when the block ends well.

    Raises:
        UsageError: `path` is taken, is a file, cannot be made, or another run is writing it.
        DotexportError: the disk is full.
    """
    path = path.expanduser().resolve()
    partial = hidden(path, "partial")
    try:
        check_free(path, overwrite=overwrite)
    except OSError as error:
        raise _cannot_be_made(path, error) from error
    with occupied(path):
        try:
            _clear_stale(path)
            partial.mkdir()
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        try:
            yield partial
            check_free(path, overwrite=overwrite)  # hours may have passed
            _put_in_place(partial, path)
        except BaseException as error:
            written = folder_bytes(partial)
            shutil.rmtree(partial, ignore_errors=True)
            explain_full_disk(error, path, written=written)
            raise


@contextmanager
def occupied(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Nobody else writes `path` during the block; `shared`: nobody else replaces it.

    Raises:
        UsageError: somebody does, or no lock can be made beside it.
    """
    path = path.expanduser().resolve()
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path, shared=shared))
        except TakenError as error:
            raise UsageError(
                f"another run is writing {path} at this moment; wait until it has ended, or give "
                "another output folder"
            ) from error
        except OSError as error:
            # What lies in a folder that may not be written cannot be replaced either.
            if not (shared and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
                raise _cannot_be_made(path, error) from error
        yield


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
    if foreign := foreign_files(path):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UsageError(
            f"{path} holds what dotexport did not write: {', '.join(foreign[:3])}{more}; "
            "--overwrite would delete it, so move it elsewhere first, or give another folder"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_ours(path: Path) -> bool:
    # An output carries the manifest; an artifact lies directly inside such an output.
    return (path / MANIFEST).is_file() or (path.parent / MANIFEST).is_file()


def _clear_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`; give back an old output they had set aside.

    Whoever holds the lock of `path` is alone: none of it can be of a run that goes on.
    """
    for role in ("old", "partial"):
        for sibling in path.parent.glob(f".{escape(path.name)}.{role}-*"):
            if role == "old" and not path.exists():
                sibling.rename(path)
            else:
                shutil.rmtree(sibling, ignore_errors=True)


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = hidden(path, "old")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _cannot_be_made(path: Path, error: OSError) -> UsageError:
    explain_full_disk(error, path)
    return UsageError(
        f"{path} cannot be made ({error.strerror}: {error.filename}); "
        "give an output folder whose parent is a writable folder"
    )
