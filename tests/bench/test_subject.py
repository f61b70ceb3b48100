"""Which artifact is found for a folder, and when a fresh one is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dotexport.bench import Workload, bench
from dotexport.bench.report.collected import collect
from dotexport.bench.subject import choose_precision, find_subject
from dotexport.errors import CheckpointError, UnsupportedModelError, UsageError
from dotexport.exports.exporting import export
from dotexport.exports.target import find_target
from dotexport.storage import manifest

Plant = Callable[..., Path]


def checkpoint(folder: Path, **config: Any) -> Path:
    """A model folder as the planted target exports it, with 6 parameters."""
    folder.mkdir(parents=True)
    config = {"planted": {}, **config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors")
    return folder


def test_an_artifact_inside_an_output_is_used_as_it_is(plant: Plant, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = plant("out/planted-quick", step_ms=1)
    checkpoint(out / "hf")
    found = find_subject("candidate", out, find_target("planted"), "quick", tmp_path)
    assert found.artifact == artifact
    assert found.num_parameters == 6
    assert found.num_bytes == (artifact / "planted.json").stat().st_size


def test_an_artifact_given_by_its_own_folder_is_used(plant: Plant, tmp_path: Path) -> None:
    for folder in (plant("out/planted-quick"), plant("any name")):
        found = find_subject("candidate", folder, find_target("planted"), "quick", tmp_path)
        assert found.artifact == folder
        assert found.num_parameters is None


@pytest.mark.parametrize("inner", ["", "hf"])
def test_a_model_without_an_artifact_is_exported(tmp_path: Path, inner: str) -> None:
    checkpoint(tmp_path / "model" / inner)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    target = find_target("planted")
    found = find_subject("baseline", tmp_path / "model", target, "quick", scratch)
    assert found.artifact.parent == scratch
    plan = json.loads((found.artifact / "planted.json").read_text(encoding="utf-8"))
    assert plan["precision"] == "quick"


def test_the_stock_target_loads_a_checkpoint_where_it_lies(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    (model / "notes.txt").write_text("not part of the model", encoding="utf-8")
    target = find_target("hf")
    found = find_subject("baseline", model, target, target.precisions[0], tmp_path)
    assert found.artifact == model
    files = (model / "config.json", model / "model.safetensors")
    assert found.num_bytes == sum(file.stat().st_size for file in files)


def test_precision_follows_the_only_artifact_there_is(plant: Plant, tmp_path: Path) -> None:
    target = find_target("planted")
    assert choose_precision(target, None, tmp_path) == "slow"
    plant("planted-quick")
    assert choose_precision(target, None, tmp_path) == "quick"
    plant("planted-slow")
    with pytest.raises(UsageError, match="--precision"):
        choose_precision(target, None, tmp_path)
    assert choose_precision(target, "slow", tmp_path) == "slow"
    with pytest.raises(UsageError, match="it writes slow, quick"):
        choose_precision(target, "int4", tmp_path)


def test_a_model_the_target_cannot_hold_is_refused_with_every_reason(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", problems=["too wide", "too long"])
    with pytest.raises(UnsupportedModelError, match="too wide; too long"):
        find_subject("baseline", model, find_target("planted"), "quick", tmp_path)


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    target = find_target("planted")
    with pytest.raises(UsageError, match="is no folder"):
        find_subject("candidate", tmp_path / "nowhere", target, "quick", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither an artifact"):
        find_subject("candidate", tmp_path / "empty", target, "quick", tmp_path)


def test_the_report_lands_in_the_output_of_the_candidate(
    plant: Plant, small: Workload, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plant("out/planted-slow")
    manifest.update(out)
    baseline = checkpoint(tmp_path / "model", planted={"step_ms": 8})
    bench(out, baseline, "planted", workload=small)
    report = json.loads((out / "reports" / "bench.json").read_text(encoding="utf-8"))
    assert report["precision"] == "slow"
    assert "faster" in report["comparisons"]["tpot"]["verdict"]


@pytest.mark.parametrize("damage", ["changed", "added", "missing"])
def test_what_was_changed_since_it_was_exported_is_not_measured(
    tiny_llama: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    export(tiny_llama("wide-heads"), ["hf"], out=out, verify=False)
    target = find_target("hf")
    assert find_subject("candidate", out, target, "as-stored", tmp_path).artifact == out / "hf"
    file = out / "hf" / "tokenizer.json"
    if damage == "changed":
        file.write_text(file.read_text() + " ")
    elif damage == "added":
        (out / "hf" / "adapter_config.json").write_text("{}")
    else:
        file.unlink()
    for folder in (out, out / "hf"):
        with pytest.raises(CheckpointError, match="is not what was exported"):
            find_subject("candidate", folder, target, "as-stored", tmp_path)
    with pytest.raises(CheckpointError, match="is not what was exported"):
        collect([out])
