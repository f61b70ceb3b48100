"""Reports of models that never ran: timings around a known ratio, and outputs that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.bench import BenchResult, Measurement, Sample, Workload
from dotexport.bench.report import write_report
from dotexport.storage import manifest
from dotexport.storage.files import write_json

MACHINE = {
    "python": "3.11.7",
    "platform": "Linux",
    "cpu": "Test CPU",
    "cores": {"physical": 2, "usable": 2},
    "memory_bytes": 8_000_000_000,
    "libraries": {"dotexport": "0.1.0", "onnxruntime": "1.25.0", "torch": "2.13.0"},
    "threads": 2,
    "load_average": [0.1, 0.1, 0.1],
}
Make = Callable[..., BenchResult]


def measured(name: str, pace: float, noise: float, groups: int, seed: int, **facts: Any) -> Any:
    """A model of 20 ms to the first token and 5 ms for each of three more, times `pace`."""
    rng = np.random.default_rng(seed)

    def times(mean: float, count: int) -> list[float]:
        found: list[float] = (pace * mean * (1 + noise * rng.standard_normal(count))).tolist()
        return found

    samples = [
        Sample(group, times(20, 1)[0], tuple(times(5, 3))) for group in range(groups) for _ in "ab"
    ]
    return Measurement(
        name=name,
        source=f"/models/{name}",
        artifact=f"/models/{name}/ort",
        vocabulary=50,
        import_s=0.1,
        load_s=0.2,
        first_run_ms=30.0,
        warmups=10,
        warmed_up=True,
        harness_overhead_us=0.3,
        rss_before_load_bytes=50_000_000,
        providers=("CPUExecutionProvider",),
        samples=tuple(samples),
        **{"artifact_bytes": 20_000_000, "num_parameters": 5_000_000, **facts},
        peak_rss_bytes=int(100_000_000 * pace),
    )


@pytest.fixture(scope="session")
def make() -> Make:
    """make(pace=0.8): a bench whose candidate takes 0.8x of its baseline's time."""

    def made(
        pace: float = 0.8,
        *,
        noise: float = 0.02,
        groups: int = 12,
        seed: int = 0,
        baseline: float = 1.0,
        machine: dict[str, Any] | None = None,
        **changes: Any,
    ) -> BenchResult:
        small = {"artifact_bytes": 12_000_000, "num_parameters": 3_000_000}
        result = BenchResult(
            target="ort-cpu",
            precision="fp32",
            workload=Workload(prompt_length=8, generation_length=4, threads=2, rounds=1),
            environment=MACHINE | (machine or {}),
            candidate=measured("candidate", pace, noise, groups, 2 * seed, **small),
            baseline=measured("baseline", baseline, noise, groups, 2 * seed + 1),
        )
        return replace(result, **changes)

    return made


@pytest.fixture
def write(make: Make, tmp_path: Path) -> Callable[..., Path]:
    """Write the report of make(...) into a file of this name."""

    def written(name: str = "bench.json", **how: Any) -> Path:
        file = tmp_path / name
        write_json(file, make(**how).as_dict())
        return file

    return written


def output_at(folder: Path, make: Make, **section: Any) -> Path:
    """An output with everything that a report shows, two batches of it a sweep."""
    phase = {"max_abs": 2e-5, "kl": 1e-9, "top1": 1.0, "rounding": None}
    parity = {
        "phases": {"prefill": phase},
        "passed": True,
        "problems": [],
        "limits": {"max_abs": 1e-3, "kl": None, "perplexity_ratio": None},
        "perplexity_ratio": 1.0,
    }
    (folder / "hf").mkdir(parents=True)
    with (folder / "hf" / "model.safetensors").open("wb") as stream:
        stream.truncate(6_000_000)
    weights = manifest.hash_files(folder / "hf")
    manifest.update(
        folder,
        **{
            "source": {"model": folder.name, "licence": None, "bytes": 10_000_000},
            "sizes": {"hidden_size": [64, 48], "parameters": [5_000_000, 3_000_000]},
            "shrink": {
                "narrow": {"mlp": "obs", "heads": "obs", "refit": True, "local": None, "seed": 0}
            },
            "basis": {"method": "pca"},
            "calibration": {"source": "c.txt", "windows": 4, "seqlen": 64, "sha256": "cd" * 32},
            "environment": {k: v for k, v in MACHINE.items() if k != "threads"},
            "artifacts": {
                "hf": {"target": "hf", "precision": "as-stored", "bytes": 6_100_000}
                | {"files": weights, "parity": parity},
                "ort-cpu-fp32": {"target": "ort-cpu", "precision": "fp32", "bytes": 12_000_000}
                | {"files": {}, "parity": parity},
            },
            "quality": {
                "text": "t.txt",
                "num_windows": 32,
                "num_tokens": 2016,
                "perplexity": 8.0,
                "baseline_perplexity": 7.5,
                "kl": 0.05,
                "top1_agreement": 0.9,
                "log_ratio_error": 0.01,
            },
            **section,
        },
    )
    names = ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
    sites = [
        {"layer": layer, "site": site, "error": 0.01 * (layer + 1), "analytic_error": 0.1}
        for layer in range(3)
        for site in names
    ]
    reports = folder / "reports"
    write_json(reports / "shrink.json", {"sites": sites})
    write_json(reports / "bench-ort-cpu-fp32.json", make().as_dict())
    batches = [
        make(workload=Workload(prompt_length=8, generation_length=4, threads=2, batch_size=size))
        for size in (1, 4)
    ]
    sweep = {"schema": "dotexport.sweep/1", "results": [one.as_dict() for one in batches]}
    write_json(reports / "bench-ort-cpu-fp32-sweep.json", sweep)
    (folder / "recipe.yaml").write_text(json.dumps({"model": folder.name}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def fill(make: Make) -> Callable[..., Path]:
    """fill(folder): an output with everything that a report shows, in this folder."""

    def filled(folder: Path, **section: Any) -> Path:
        return output_at(folder, make, **section)

    return filled


@pytest.fixture(scope="session")
def output(fill: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("outputs") / "small")


@pytest.fixture(scope="session")
def report(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page."""
    return write_report([output], tmp_path_factory.mktemp("page") / "report.html")
