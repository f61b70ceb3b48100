"""What torchrun says of the processes that it started: the environment alone, so that a verb which
takes no part starts as light as ever."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dotexport.errors import UsageError


@dataclass(frozen=True)
class Started:
    """One process of those that torchrun started; of any other, the only one.

    Attributes:
        rank: its number among all.
        size: how many there are.
        local: its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Started:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # others set WORLD_SIZE for reasons of theirs
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def one_process(verb: str) -> None:
    """Refuse to run once per process of torchrun over the same output.

    Raises:
        UsageError: there are several.
    """
    if (size := Started.here().size) > 1:
        raise UsageError(
            f"{verb} runs in one process, and torchrun started {size}; start it without torchrun, "
            "which serves shrink of decoder LLMs alone"
        )


def silence_others() -> None:
    """All processes read the same command, and the first one speaks for them."""
    if Started.here().rank > 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def speak(first: str) -> None:
    """From now on this process is heard, whichever it is."""
    sys.stderr = sys.__stderr__
    print(first, file=sys.stderr)
