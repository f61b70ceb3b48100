"""Shrinking to a budget of time: what the table promised is measured again, and both are shown."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dotexport.app.cli import main
from dotexport.axes.plan import read_model
from dotexport.bench import promise
from dotexport.models.checkpoint import read_config
from dotexport.sizes.latency_table import SCHEMA, describe, device, runtime_versions
from dotexport.storage import manifest

TILE = 32
PACE = 3  # so that waking up late, as on a busy machine, is a small part of each wait


def wait(mlp: int) -> float:
    """Milliseconds of the planted target (its tiled()), for the tiny Llama with 3 layers."""
    tiles = -(-mlp // TILE)
    return float(PACE * (1 + 48 / 16 + 3 * (1.5 * tiles + 0.5 * 2)))


@pytest.fixture
def model(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama whose tokens take as long as its MLP has tiles of 32: 88 neurons are three."""
    folder = shutil.copytree(tiny_llama("wide-heads"), tmp_path / "model")
    config = read_config(folder) | {"planted": {"tile": TILE, "pace": PACE}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def table(model: Path, *, faster: float = 1.0) -> Path:
    """What `dotexport latency` finds for it; `faster` makes it promise more than is true."""
    family, sizes = read_model(read_config(model))
    rows = []
    for mlp in (24, 32, 48, 64, 72):
        ratio = {"ratio": faster * wait(mlp) / wait(88)}
        row = {"hidden_size": 48, "intermediate_size": mlp, "num_key_value_heads": 2}
        rows.append(row | {"layers": 3, "batch": 1, "decode": ratio, "prefill": ratio})
    content = {
        "schema": SCHEMA,
        "model": describe(family.architecture, sizes),
        "target": "planted",
        "precision": "slow",
        "threads": 1,
        "device": device() | {"libraries": runtime_versions("planted")},
        "workload": {"prompt": 4, "generate": 2},
        "layers": {"model": 3, "measured": 3, "shallow": None},
        "original": {"1": {"decode_ms": wait(88), "prefill_ms": wait(88)}},
        "rows": rows,
        "held_out": [],
        "skipped": [],
    }
    file = model.parent / "table.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture
def shrink(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Shrink on the command line to a budget of time; the manifest that comes of it."""
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 " * 100, encoding="utf-8")

    # What is planted is far from either budget: two pairs of processes see it.
    monkeypatch.setattr(promise, "ROUNDS", 2)

    def call(budget: str, file: Path, *flags: str) -> dict[str, Any]:
        fast = ("--samples", "4", "--seqlen", "32", "--heal", "none", "--basis", "select")
        fast = (*fast, "--allocate", "rule")  # what a model of noise measures is noise
        keep = ("--hidden", "48", "--kv-heads", "2", "--calib", text, "--overwrite")
        asked = ("--latency", budget, "--latency-table", file)
        out = tmp_path / "out"
        command = ["shrink", model, "-o", out, *asked, *keep, *fast, *flags]
        monkeypatch.setattr(sys, "argv", ["dotexport", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return manifest.read(out)

    return call


def test_a_promise_that_holds_is_kept_and_shown(
    shrink: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    record = shrink("0.7x", table(model))
    assert record["sizes"]["intermediate_size"][1] == 32  # one tile, and no neuron less
    found = record["latency"]
    assert found["predicted"] == pytest.approx(wait(32) / wait(88))
    # Waits of 35 and 62 ms end late, on a busy machine by some milliseconds both.
    assert found["predicted"] - 0.02 < found["measured"]["ratio"] < 0.7
    assert found["verdict"] in ("kept", "kept within noise")
    assert found["table"]["file"].endswith("table.json")
    out = tmp_path / "out"
    report = json.loads((out / "reports" / "shrink.json").read_text(encoding="utf-8"))
    assert report["latency"] == found
    bench = json.loads((out / "reports" / "bench-latency.json").read_text(encoding="utf-8"))
    assert bench["target"] == "planted"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"planted-slow, budget 0.70x, promised {wait(32) / wait(88):.2f}x" in card


def test_a_promise_that_does_not_hold_is_told(
    shrink: Callable[..., dict[str, Any]], model: Path
) -> None:
    """A table of a kernel twice as quick: half of the time is promised, and not kept."""
    record = shrink("0.4x", table(model, faster=0.5))
    assert record["latency"]["predicted"] <= 0.4
    assert record["latency"]["verdict"] == "missed"
