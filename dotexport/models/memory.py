"""How much memory is free, and how much of it a model may take as a whole."""

from __future__ import annotations

import sys

import psutil
import torch

SHARE = 0.5  # of free memory: text, activations and logits come on top


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so much may be held there."""
    return num_bytes <= SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has taken yet, within what this process may have (`ulimit -v`)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    return free if sys.platform == "win32" else min(free, _below_limit())


def _below_limit() -> int:
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(0, int(most) - int(psutil.Process().memory_info().vms))
