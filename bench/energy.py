"""Joules of a model: the processor's own counters (RAPL), or the GPU's (NVML).

Both count everything on the chip, idle power and other processes included; the bench reads them
before and after each block, so neighbours fall on both models alike.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts energy since it was made."""

    source: str

    def joules(self) -> float:
        """Since some fixed moment; only differences mean anything."""
        ...


@dataclass
class Rapl:
    """Running Average Power Limit: one counter of microjoules per processor package.

    Counters wrap at max_energy_range_uj; read at least once in each round, their sum does not.
    """

    packages: list[Path]
    source: str = "RAPL, processor packages"
    last: dict[Path, int] = field(default_factory=dict)
    total_uj: int = 0

    def joules(self) -> float:
        for package in self.packages:
            now = int((package / "energy_uj").read_text())
            gone = now - self.last.get(package, now)
            if gone < 0:
                gone += int((package / "max_energy_range_uj").read_text())
            self.total_uj += gone
            self.last[package] = now
        return self.total_uj / 1e6


@dataclass
class Nvml:
    """The counter of NVIDIA GPUs since Volta, in millijoules."""

    library: Any
    handle: Any
    source: str = "NVML, whole GPU"

    def joules(self) -> float:
        return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3


def find_meter(device: str, powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """A meter for "cpu" or "cuda", or None and the reason why there is none."""
    return _nvml() if device == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> tuple[Meter | None, str]:
    # Packages have one number (intel-rapl:0); their parts, counted in them already, have two.
    packages = sorted(one for one in powercap.glob("*rapl:*") if one.name.count(":") == 1)
    if not packages:
        return None, f"no RAPL counters in {powercap}: not this processor, or a virtual machine"
    meter = Rapl(packages)
    try:
        meter.joules()
    except OSError as error:
        return None, f"{packages[0]}/energy_uj cannot be read ({error.strerror}): root may"
    return meter, ""


def _nvml() -> tuple[Meter | None, str]:
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None, "NVML is not installed: pip install nvidia-ml-py"
    try:
        library.nvmlInit()
        meter = Nvml(library, library.nvmlDeviceGetHandleByIndex(0))
        meter.joules()
    except library.NVMLError as error:
        return None, f"NVML gives no energy: {error}"
    return meter, ""
