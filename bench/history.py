"""A history: one line of JSON for each comparison, in a file that only grows.

Lines are appended with one write under a lock. A process that is killed in the middle leaves at
worst a piece of a line: the next one starts on a line of its own, and readers leave the piece out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dotexport.errors import UsageError
from dotexport.version import __version__

from .comparison import Compared, as_dict, headline
from .gate import Line
from .intervals import Estimate

SCHEMA = "dotexport.history/1"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One comparison of the past.

    Attributes:
        conditions: device, runtime and workload.
        figures: the model's own, by name.
        ratios: over its baseline (or the earlier report), with intervals where there are.
    """

    time: datetime
    commit: str | None
    label: str
    conditions: Mapping[str, Any]
    figures: Mapping[str, float]
    ratios: Mapping[str, Estimate]

    @property
    def device(self) -> str:
        """Entries of different devices, runtimes or workloads are not of one line."""
        told = json.dumps(self.conditions, sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:8]


def append_history(file: Path, comparisons: Iterable[Compared], lines: Sequence[Line] = ()) -> None:
    """Add one line for each comparison, with the verdict of its gate."""
    now, commit = datetime.now(UTC).isoformat(timespec="seconds"), _commit()
    text = "".join(
        json.dumps(_entry(compared, lines, now, commit), allow_nan=False) + "\n"
        for compared in comparisons
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+", buffering=0) as stream:  # one write, not one for each buffer
        _lock(stream.fileno())
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            # A killed process left a piece of a line; what comes now must not continue it.
            text = text if stream.read(1) == b"\n" else "\n" + text
        stream.write(text.encode())
        os.fsync(stream.fileno())


def read(file: Path) -> list[Entry]:
    """All entries, oldest first; lines that cannot be read are left out with a warning.

    Raises:
        UsageError: no such file, or nothing in it can be read.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"history {file} cannot be read: {error.strerror}") from error
    found = [entry for number, line in enumerate(lines, 1) if (entry := _parse(line, file, number))]
    if not found:
        raise UsageError(
            f"{file} holds no history; `dotexport compare REPORT --history {file}` starts one"
        )
    return sorted(found, key=lambda entry: entry.time)


def _entry(
    compared: Compared, lines: Sequence[Line], now: str, commit: str | None
) -> dict[str, Any]:
    quality = {k: v for k, v in compared.report.quality.items() if isinstance(v, int | float)}
    held = [line for line in lines if line.of == compared.label]
    ratios = {name: as_dict(found) for name, found in headline(compared).items()}
    asked = {line.limit.figure: as_dict(line.found) for line in held if line.limit.relative}
    return {
        "schema": SCHEMA,
        "time": now,
        "commit": commit,
        "dotexport": __version__,
        "label": compared.label,
        "against": "earlier report" if compared.reference else "baseline",
        "conditions": dict(compared.report.conditions),
        "figures": {**compared.report.candidate.figures, **quality},
        "ratios": ratios | asked,
        "gate": [line.as_dict() for line in held],
    }


def _parse(line: bytes, file: Path, number: int) -> Entry | None:
    if not line.strip():
        return None
    try:
        stored = json.loads(line)
        if stored["schema"] != SCHEMA:
            raise ValueError(f"schema {stored['schema']!r}")
        return Entry(
            time=datetime.fromisoformat(stored["time"]),
            commit=stored["commit"],
            label=stored["label"],
            conditions={**stored["conditions"], "against": stored["against"]},
            figures=stored["figures"],
            ratios={name: Estimate(**found) for name, found in stored["ratios"].items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s, line %d is left out: %s", file, number, error)
        return None


def _commit() -> str | None:
    """HEAD of the repository that we are in, if we are in one."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows; appends are short there, too
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
