"""Energy counters and what the machine says of itself, on planted files of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from dotexport.bench import energy
from dotexport.bench.device import caches, clocks, container, gpus
from dotexport.bench.energy import find_meter


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n", encoding="ascii")


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    write(tmp_path / "intel-rapl:0", energy_uj=1_000_000, max_energy_range_uj=10_000_000)
    write(tmp_path / "intel-rapl:1", energy_uj=0, max_energy_range_uj=10_000_000)
    write(tmp_path / "intel-rapl:0:0", energy_uj=0, max_energy_range_uj=10_000_000)
    meter, reason = find_meter("cpu", tmp_path)
    assert meter is not None
    assert reason == ""
    before = meter.joules()
    write(tmp_path / "intel-rapl:0", energy_uj=3_000_000)
    write(tmp_path / "intel-rapl:1", energy_uj=500_000)
    write(tmp_path / "intel-rapl:0:0", energy_uj=9_000_000)
    assert meter.joules() - before == 2.5


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "intel-rapl:0", energy_uj=9_000_000, max_energy_range_uj=10_000_000)
    meter, _ = find_meter("cpu", tmp_path)
    assert meter is not None
    before = meter.joules()
    write(tmp_path / "intel-rapl:0", energy_uj=1_000_000)
    assert meter.joules() - before == 2.0


def test_without_counters_there_is_a_reason(tmp_path: Path) -> None:
    meter, reason = find_meter("cpu", tmp_path)
    assert meter is None
    assert "no RAPL counters" in reason


def test_counters_that_may_not_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir(parents=True)  # cannot be read as a file
    meter, reason = find_meter("cpu", tmp_path)
    assert meter is None
    assert "cannot be read" in reason


def test_without_nvml_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(energy.importlib, "import_module", absent)
    meter, reason = find_meter("cuda")
    assert meter is None
    assert "nvidia-ml-py" in reason


def test_clocks_caches_and_limits_are_read(tmp_path: Path) -> None:
    cpus = tmp_path / "devices/system/cpu"
    write(cpus / "cpu0/cpufreq", scaling_governor="performance")
    write(cpus / "intel_pstate", no_turbo=0)
    write(cpus / "cpu0/cache/index3", level=3, type="Unified", size="32768K")
    write(tmp_path / "fs/cgroup", **{"cpu.max": "150000 100000", "memory.max": 4096})
    assert clocks(tmp_path) == {"governor": "performance", "turbo": True}
    assert caches(tmp_path) == {"L3 Unified": "32768K"}
    assert container(tmp_path) == {"cpus": 1.5, "memory_bytes": 4096}


def test_what_a_system_does_not_say_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocks(tmp_path) == {"governor": None, "turbo": None}
    assert container(tmp_path) == {"cpus": None, "memory_bytes": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
