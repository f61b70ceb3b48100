"""Planted artifacts: models whose speed is known because it is nothing but waiting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dotexport.bench import BenchResult, Workload, noise_check

PLANTED = Path(__file__).parent / "planted"
Plant = Callable[..., Path]
Measured = tuple[BenchResult, dict[str, Any], list[tuple[str, int, int]]]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target `planted`, as if its package were installed."""
    monkeypatch.syspath_prepend(str(PLANTED))


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Make an artifact of the planted target: plant("name", step_ms=2)."""

    def make(name: str, **plan: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "planted.json").write_text(json.dumps(plan), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def small() -> Workload:
    """Few and short requests; planted waits need no more."""
    return Workload(
        prompt_length=4,
        generation_length=3,
        threads=1,
        rounds=1,
        min_iterations=16,
        min_seconds=0,
        min_warmups=0,
        max_warmup_seconds=0,
    )


@pytest.fixture(scope="session")
def measured(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One bench of a model against itself: its result, what it wrote and what it told."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "planted.json").write_text("{}", encoding="utf-8")
    report, told = folder / "bench.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLANTED))
        result = noise_check(
            folder, "planted", workload=small, out=report, progress=lambda *step: told.append(step)
        )
    return result, json.loads(report.read_text(encoding="utf-8")), told
