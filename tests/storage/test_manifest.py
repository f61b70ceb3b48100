"""The manifest says what an output is: sections are replaced one by one and in one step, bytes
that changed are found by their hash, and a damaged file is named instead of being written over."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dotexport import __version__
from dotexport.errors import CheckpointError
from dotexport.storage import manifest
from dotexport.storage.files import MANIFEST, write_json


def stored(size: int) -> dict[str, Any]:
    """An artifact."""
    return {"target": "hf", "precision": "as-stored", "bytes": size, "files": {}, "parity": None}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output with two sections."""
    manifest.update(tmp_path / "out", recipe="48", artifacts={"hf": stored(7)})
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Sections ---------------------------------------------------------------------------------------


def test_an_update_replaces_its_sections_and_keeps_every_other_one(out: Path) -> None:
    before = manifest.read(out)
    assert before["dotexport"] == __version__
    told = {"kl": 0.1 + 0.2, "who": "Łukasz ×"}
    manifest.update(out, artifacts={"onnx-fp32": stored(1)}, told=told)
    # Replaced, not merged below the first level: an artifact that went must not come back.
    assert manifest.read(out) == before | {
        "artifacts": {"onnx-fp32": stored(1)},
        "told": told,
    }
    assert list(manifest.read(out)) == [*before, "told"]
    assert names(out) == [MANIFEST]


def test_nothing_to_update_changes_no_byte(out: Path) -> None:
    before = (out / MANIFEST).read_bytes()
    manifest.update(out)
    assert (out / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")])
def test_an_interrupted_write_leaves_the_old_manifest(
    out: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str
) -> None:
    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = (out / MANIFEST).read_bytes()
    monkeypatch.setattr(owner, step, end)
    with pytest.raises(KeyboardInterrupt):
        manifest.update(out, artifacts={})
    with pytest.raises(KeyboardInterrupt):
        manifest.update(out / "new", artifacts={})
    assert (out / MANIFEST).read_bytes() == before
    assert not manifest.is_output(out / "new")
    assert names(out / "new") == []
    assert names(out) == [MANIFEST, "new"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("weights"), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_the_old_manifest_stays(
    out: Path, value: object
) -> None:
    before = (out / MANIFEST).read_bytes()
    with pytest.raises((ValueError, TypeError), match="JSON"):
        manifest.update(out, quality={"kl": value})
    assert (out / MANIFEST).read_bytes() == before


# What is an output ------------------------------------------------------------------------------


def test_an_output_is_a_folder_with_the_file_and_nothing_else_is(out: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    assert manifest.is_output(out)
    others = [tmp_path, tmp_path / "model", tmp_path / "odd", out / MANIFEST]
    for other in (*others, tmp_path / "none"):
        assert not manifest.is_output(other)
        with pytest.raises(CheckpointError, match="is not an output of dotexport") as refused:
            manifest.read(other)
        assert str(refused.value).startswith(f"{other} ")
        assert "give the folder that `dotexport shrink -o`" in str(refused.value)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda whole: whole[:-4], "is not valid JSON"),
    "empty": (lambda whole: b"", "is not valid JSON"),
    "no text": (lambda whole: whole.replace(b"hf", b"\xff\xfe"), "is not valid JSON"),
    "a list": (lambda whole: b"[" + whole + b"]", "must hold a JSON object, not a list"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_named_and_not_written_over(out: Path, damage: str) -> None:
    change, said = DAMAGED[damage]
    file = out / MANIFEST
    file.write_bytes(change(file.read_bytes()))
    before = file.read_bytes()
    for use in (manifest.read, manifest.update):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))} {said}.*export again"):
            use(out)
    assert file.read_bytes() == before


# Hashes -----------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "below" / "deep").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 5000)
    (folder / "below" / "deep" / "a.txt").write_text("a")
    (folder / "below" / "nothing").touch()
    (folder / ".hidden").write_text("b")
    return folder


def test_every_file_below_is_listed_with_its_bytes_and_its_digest(artifact: Path) -> None:
    found = manifest.hash_files(artifact)
    expected = [".hidden", "below/deep/a.txt", "below/nothing", "model.onnx"]
    assert list(found) == expected
    for name in expected:
        content = (artifact / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert found[name] == {"bytes": len(content), "sha256": digest}
        assert manifest.sha256(artifact / name) == digest
    # Of no bytes at all, as FIPS 180-4 has it.
    assert found["below/nothing"]["sha256"].startswith("e3b0c44298fc1c149afbf4c8996fb924")


@pytest.mark.parametrize("at", [0, 655_360, 1_279_999])
def test_one_changed_byte_changes_the_entry_of_its_file_alone(artifact: Path, at: int) -> None:
    before = manifest.hash_files(artifact)
    file = artifact / "model.onnx"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    after = manifest.hash_files(artifact)
    assert {name for name in before if after[name] != before[name]} == {"model.onnx"}
    assert after["model.onnx"]["bytes"] == before["model.onnx"]["bytes"]


def test_of_given_files_only_those_are_listed_in_the_same_order(artifact: Path) -> None:
    everything = manifest.hash_files(artifact)
    given = [artifact / "model.onnx", artifact / "below", artifact / "below" / "nothing"]
    some = manifest.hash_files(artifact, iter(given))
    assert list(some.items()) == [(k, everything[k]) for k in ("below/nothing", "model.onnx")]


# Environment ------------------------------------------------------------------------------------


def test_the_environment_is_told_without_importing_libraries() -> None:
    code = (
        "import json, sys; from dotexport.storage import manifest\n"
        "print(json.dumps(manifest.environment()))\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    told = json.loads(done.stdout)
    assert told == manifest.environment()
    assert told["libraries"]["torch"] == version("torch")
    assert told["python"] == sys.version.split()[0]
    assert 1 <= told["cores"]["usable"] <= (os.cpu_count() or 1)


def test_a_library_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "LIBRARIES", ("numpy", "no-such-library", "dotexport"))
    libraries = manifest.environment()["libraries"]
    assert list(libraries) == ["numpy", "dotexport"]
    assert libraries["numpy"] == version("numpy")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a section of another kind": ({"artifacts": ["hf"]}, "artifacts must be a valid dictionary"),
    "an artifact without files": (
        {"artifacts": {"hf": {"target": "hf"}}},
        "artifacts.hf.precision is not there",
    ),
    "a number in quotes": (
        {"artifacts": {"hf": stored(1) | {"bytes": "1"}}},
        "artifacts.hf.bytes must be a valid integer, not '1'",
    ),
    "an artifact elsewhere": (
        {"artifacts": {"/etc": stored(1)}},
        "must be the name of a folder in the output, not '/etc'",
    ),
    "an artifact above": ({"artifacts": {"..": stored(1)}}, "must be the name of a folder"),
    "a file above its artifact": (
        {"artifacts": {"hf": stored(1) | {"files": {"../x": {"bytes": 1, "sha256": "ab" * 32}}}}},
        "must be a path below its folder, not '../x'",
    ),
    "no hash": (
        {"artifacts": {"hf": stored(1) | {"files": {"x": {"bytes": 1, "sha256": "ab"}}}}},
        "artifacts.hf.files.x.sha256",
    ),
    "figures that are none": ({"quality": {"perplexity": None}}, "quality.perplexity"),
    "half of a shrink": (
        {
            "shrink": {
                "narrow": {"mlp": "obs", "heads": "obs", "refit": True, "local": None, "seed": 0}
            }
        },
        "source",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_says_what_none_of_ours_does_is_refused(out: Path, name: str) -> None:
    sections, said = WRONG[name]
    write_json(out / MANIFEST, json.loads((out / MANIFEST).read_text()) | sections)
    with pytest.raises(CheckpointError, match=re.escape(said)) as refused:
        manifest.read(out)
    assert str(refused.value).startswith(f"{out / MANIFEST}: ")
    assert "export again" in str(refused.value)


# Several at once --------------------------------------------------------------------------------

ADDING = """
import sys
from pathlib import Path
from dotexport.storage import manifest
out, name = Path(sys.argv[1]), sys.argv[2]
for number in range(25):
    entry = {"target": "t", "precision": "p", "bytes": 1, "files": {}, "parity": None}
    manifest.merge(out, artifacts={f"{name}{number}": entry})
"""


def test_nothing_that_several_write_at_once_is_lost(out: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", ADDING, str(out), name]) for name in "abc"]
    assert [run.wait() for run in runs] == [0, 0, 0]
    added = {f"{name}{number}" for name in "abc" for number in range(25)}
    assert set(manifest.read(out)["artifacts"]) == {"hf", *added}
    assert names(out) == [MANIFEST]


def test_what_a_killed_write_left_is_cleared_by_the_next(out: Path) -> None:
    (out / f".{MANIFEST}.partial-0a1b").write_text("{")
    manifest.update(out, told=1)
    assert names(out) == [MANIFEST]
