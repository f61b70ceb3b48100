"""Shapes of request by the use they stand for; a flag given beside one overrides its number."""

from __future__ import annotations

from typing import Any

from dotexport.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    # A turn of a conversation: its history in, a paragraph out, one user.
    "chat": {"prompt_length": 512, "generation_length": 128, "batch_size": 1},
    # Retrieved passages in, a short answer out: the prefill is what is waited for.
    "rag": {"prompt_length": 2048, "generation_length": 64, "batch_size": 1},
    # A command on a small device that has other things to do: short, on one thread.
    "edge": {"prompt_length": 64, "generation_length": 32, "batch_size": 1, "threads": 1},
    # Documents worked through overnight: nobody waits, the batch counts.
    "offline": {"prompt_length": 256, "generation_length": 128, "batch_size": 16},
}


def find_preset(name: str) -> dict[str, Any]:
    """Fields of a Workload.

    Raises:
        UsageError: no preset has this name.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
