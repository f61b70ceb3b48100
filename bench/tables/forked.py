"""One command line in a process of its own that starts at once: a fork of this one.

A case that crashes, hangs, or takes all memory ends its own process and no other.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KILLED, HUNG = -9, -1
FAULT = "which is a fault of its own"
"""What the command line says of an exception that nobody foresaw."""


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        code: exit code; minus the signal that ended it; HUNG: it was stopped after `patience`.
        said: on both streams.
    """

    code: int
    said: str

    @property
    def clear(self) -> bool:
        """It did what was asked, or refused it in words and with a documented code."""
        return self.code in range(7) and FAULT not in self.said and "Traceback" not in self.said

    @property
    def sentence(self) -> str:
        """The last line, where the error stands."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def dotexport(
    *arguments: object,
    limits: Mapping[int, int] | None = None,
    kill_after: float | None = None,
    patience: float = 120.0,
) -> Ending:
    """The command line with these arguments.

    Args:
        limits: resource.RLIMIT_* -> the most, in its own unit.
        kill_after: seconds until SIGKILL.
    """
    from dotexport.app.cli import main

    words = ["dotexport", *map(str, arguments)]
    return forked(lambda: _called(main, words), limits or {}, kill_after, patience)


def forked(
    body: Callable[[], object],
    limits: Mapping[int, int] | None = None,
    kill_after: float | None = None,
    patience: float = 120.0,
) -> Ending:
    """What a function says and exits with, in a fork."""
    with tempfile.TemporaryFile() as stream:
        child = os.fork()
        if child == 0:
            _run(body, stream.fileno(), limits or {})
        code = _waited(child, kill_after, patience)
        stream.seek(0)
        return Ending(code, stream.read().decode("utf-8", "replace"))


def _run(body: Callable[[], object], descriptor: int, limits: Mapping[int, int]) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for kind, most in limits.items():
            resource.setrlimit(kind, (most, most))
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.stderr.write(f"Traceback: {type(error).__name__}: {error}\n")
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _called(main: Callable[[], None], words: Sequence[str]) -> None:
    sys.argv = list(words)
    main()


def _waited(child: int, kill_after: float | None, patience: float) -> int:
    started = time.monotonic()
    limit = patience if kill_after is None else kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return HUNG if kill_after is None else KILLED
        time.sleep(0.002)


def memory_now() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()
