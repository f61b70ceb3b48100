"""The machine that a figure was taken on: processor, clocks, caches, container, GPU.

Everything is read, nothing is set; what a system does not say is None.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from dotexport.storage import manifest

from .workload import Workload

SYSTEM = Path("/sys")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "persistence_mode")


def environment(workload: Workload) -> dict[str, Any]:
    """What figures depend on, before anything runs."""
    return {**machine(), "threads": workload.threads}


def machine() -> dict[str, Any]:
    """The part of it that is no workload's."""
    return {
        **manifest.environment(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "memory_available_bytes": psutil.virtual_memory().available,
        **clocks(),
        "caches_bytes": caches(),
        "container": container(),
        "gpus": gpus(),
    }


def clocks(system: Path = SYSTEM) -> dict[str, Any]:
    """Frequency governor, and whether the processor may go above its nominal clock."""
    cpus = system / "devices/system/cpu"
    no_turbo, boost = _text(cpus / "intel_pstate/no_turbo"), _text(cpus / "cpufreq/boost")
    turbo = None if boost is None else boost == "1"
    return {
        "governor": _text(cpus / "cpu0/cpufreq/scaling_governor"),
        "turbo": turbo if no_turbo is None else no_turbo == "0",
    }


def caches(system: Path = SYSTEM) -> dict[str, str]:
    """Size of each cache of the first processor, as the kernel writes it."""
    found = sorted((system / "devices/system/cpu/cpu0/cache").glob("index*"))
    named = ((_text(one / "level"), _text(one / "type"), _text(one / "size")) for one in found)
    return {f"L{level} {kind}": size for level, kind, size in named if size}


def container(system: Path = SYSTEM) -> dict[str, Any]:
    """Limits of the control group (version 2): processors' worth of time, and bytes."""
    group = system / "fs/cgroup"
    quota, _, period = (_text(group / "cpu.max") or "max").partition(" ")
    memory = _text(group / "memory.max") or "max"
    return {
        "cpus": None if quota == "max" else int(quota) / int(period or 100_000),
        "memory_bytes": None if memory == "max" else int(memory),
    }


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each; empty where there is none."""
    said = ask_nvidia(f"--query-gpu={','.join(GPU_FIELDS)}")
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=False)) for line in said]


def ask_nvidia(query: str) -> list[str]:
    """Lines of nvidia-smi's answer; none where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # no such file, or none that this user may read
        return None


def one_cpu_per_core(system: Path = SYSTEM) -> list[int]:
    """Processors that this process may use, without the second threads of their cores."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = system / f"devices/system/cpu/cpu{cpu}/topology"
        chosen.setdefault(_text(topology / "thread_siblings_list") or str(cpu), cpu)
    return list(chosen.values())
