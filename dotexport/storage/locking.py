"""Who writes where right now: locks that end with the process that holds them.

The kernel keeps them (flock), so that they hold between containers and, on a shared file system,
between hosts, and none outlives a killed process: what its number would say, they never ask. A
lock file that nobody holds is the trace of such an end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept apart there
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}
"""Lock file -> how many blocks of this process hold it."""


class TakenError(Exception):
    """Somebody else holds the lock."""


def lock_file(path: Path) -> Path:
    """The lock of a folder or file lies beside it."""
    return path.parent / f".{path.name}.lock"


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `path`; inside of a block of this process that holds it, nothing happens.

    Args:
        shared: with others that share it, and none that do not.
        wait: until it is free.

    Raises:
        TakenError: it is not free, and nobody wanted to wait.
        OSError: no file can be made beside `path`.
    """
    file = lock_file(path)
    if fcntl is None or file in _held:
        _held[file] = _held.get(file, 0) + 1
        descriptor = None
    else:
        descriptor = _acquired(file, shared=shared, wait=wait)
        _held[file] = 1
    try:
        yield
    finally:
        _held[file] -= 1
        if not _held[file]:
            del _held[file]
        if descriptor is not None:
            _release(file, descriptor)


def _acquired(file: Path, *, shared: bool, wait: bool) -> int:
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, kind)
            # Whoever held it may have removed the file meanwhile: then this lock is of nothing.
            if _is_same(file, descriptor):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise TakenError(str(file)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(file: Path, descriptor: int) -> None:
    try:
        # Others may share it; the last one removes the file, while nobody can take it.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(file, descriptor):
            file.unlink()
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
