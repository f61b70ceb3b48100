"""The asking side of a worker: starts the process, speaks its protocol, and always ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dotexport import errors
from dotexport.errors import DotexportError

STDERR_LINES = 12
PATIENCE_S = 5.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Worker:
    """One model in a process of its own; leaving the `with` block ends the process.

    Args:
        name: how to call the model in messages.
        threads: for the thread pools of the libraries below the runtime.
    """

    def __init__(self, name: str, *, threads: int | None = None) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed by __exit__)
        # -P and the whole path: the worker sees the modules that this process sees, and no other.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dotexport.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(threads),
            encoding="utf-8",
        )

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            DotexportError: what the worker reports, or that it died, with its last words.
        """
        self.send(do, **arguments)
        return self.receive(do)

    def send(self, do: str, **arguments: object) -> None:
        """Let it start; `receive` waits. Several workers that were sent to run at once."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # receive says how it ended
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self, do: str) -> dict[str, Any]:
        """The answer to the last request; raises as `ask` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise DotexportError(self._obituary(do))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[DotexportError] = getattr(errors, answer["error"], DotexportError)
            raise kind(f"{self.name}: {answer['message']}")
        return answer

    def _obituary(self, do: str) -> str:
        code = self._process.wait()
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (killed: out of memory?)" if code == -9 else ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()[-STDERR_LINES:]
        said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        return (
            f"{self.name}: the measuring process ended with {cause}{hint} during {do!r}; "
            f"expected an answer. Its last words on stderr:\n{said}"
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # it may be in the middle of a long answer that nobody will read
            self._process.kill()
        self._close_pipes()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # it died with a request unread
                if pipe is not None:
                    pipe.close()


def _environment(threads: int | None) -> dict[str, str]:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    limits = {name: str(threads) for name in THREAD_VARIABLES} if threads else {}
    return {**os.environ, "PYTHONPATH": path, **limits}
