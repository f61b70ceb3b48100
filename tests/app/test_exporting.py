"""Artifacts and the files of users beside them: what fails leaves all as it was."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dotexport.app import narrowed_folder, pipeline
from dotexport.app.recipe import Recipe
from dotexport.exports import exporting
from dotexport.models import checkpoint
from dotexport.storage import manifest
from dotexport.targets import BUILT_IN

from .conftest import NARROW, Command, Copy, names, refused, shrinking_of, written


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(OSError(errno.ENOSPC, "full"), 1, "is full"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_an_artifact_that_was_not_finished_is_not_there(
    dotexport: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    word: str,
) -> None:
    def half(self: object, source: checkpoint.Checkpoint, folder: Path, precision: str) -> NoReturn:
        (folder / "half").touch()
        raise error

    monkeypatch.setitem(BUILT_IN, "copy", f"{Copy.__module__}:Copy")
    monkeypatch.setattr(Copy, "write", half)
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    before = names(out), manifest.read(out)
    refused(dotexport("export", out, "--target", "copy"), code, word)
    assert (names(out), manifest.read(out)) == before


def test_an_export_can_be_asked_of_the_checkpoint_inside(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    outcome = dotexport("export", out / "hf", "--target", "hf", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["hf"]["parity"]["passed"]
    assert "README.md" not in names(out / "hf")


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("before", [False, True])
def test_of_an_export_that_fails_nothing_stays_and_what_was_there_does(
    dotexport: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    before: bool,
) -> None:
    def broken(*_: object) -> NoReturn:
        raise error

    monkeypatch.setitem(BUILT_IN, "copy", f"{Copy.__module__}:Copy")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "model"))
    out = tmp_path / "out"
    if before:
        assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    told = manifest.read(out) if before else None
    monkeypatch.setattr(Copy, "write", broken)
    outcome = dotexport("export", model, "--target", "copy", "-o", out, "--overwrite")
    assert outcome.code in (1, 130)
    assert names(tmp_path) == (["model", "out"] if before else ["model"])
    assert not before or manifest.read(out) == told


def test_a_second_target_is_added_by_naming_the_output(
    dotexport: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{Copy.__module__}:Copy")
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    outcome = dotexport("export", model, "--target", "copy", "-o", out)
    refused(outcome, 2, "an output of dotexport already", f"`dotexport export {out} --target ...`")
    assert "--overwrite" not in outcome.err
    assert dotexport("export", out, "--target", "copy").code == 0
    assert set(manifest.read(out)["artifacts"]) == {"hf", "copy-plain"}


def test_a_folder_of_the_user_with_the_name_of_an_artifact_is_kept(
    dotexport: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{Copy.__module__}:Copy")
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    (out / "copy-plain").mkdir()
    written(out / "copy-plain" / "letter.txt", "dear")
    refused(dotexport("export", out, "--target", "copy"), 2, "exists and is not empty")
    outcome = dotexport("export", out, "--target", "copy", "--overwrite")
    refused(outcome, 2, "holds what dotexport did not write: letter.txt")
    assert names(out / "copy-plain") == ["letter.txt"]


def in_shards(model: Path, *shards: str) -> None:
    """The tensors dealt out to files of these names, and an index of them."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {shard: {} for shard in shards}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[shards[number % len(shards)]][name] = tensor
    for shard, part in parts.items():
        (model / shard).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, model / shard, metadata={"format": "pt"})
    places = {name: shard for shard, part in parts.items() for name in part}
    written(model / checkpoint.INDEX, json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "shards", [("a.safetensors", "b b.safetensors"), ("x/w.safetensors", "y/w.safetensors")]
)
def test_shards_of_odd_names_are_exported_whole(
    dotexport: Command, model: Path, tmp_path: Path, shards: tuple[str, ...]
) -> None:
    in_shards(model, *shards)
    out = tmp_path / "out"
    outcome = dotexport("export", model, "--target", "hf", "-o", out)
    assert outcome.code == 0, outcome.err
    assert set(shards) < set(manifest.read(out)["artifacts"]["hf"]["files"])
    assert manifest.read(out)["artifacts"]["hf"]["parity"]["passed"]


@pytest.mark.parametrize("verb", ["export", "shrink"])
@pytest.mark.parametrize("shard", ["../w.safetensors", "{}/w.safetensors", "a/../../w.safetensors"])
def test_shards_outside_of_the_model_are_refused(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, shard: str, verb: str
) -> None:
    (model / "a").mkdir()
    in_shards(model, shard.format(tmp_path))
    run = (
        ["export", model, "--target", "hf", "-o", tmp_path / "out"]
        if verb == "export"
        else shrinking_of(model, text, tmp_path / "out", *NARROW)
    )
    refused(dotexport(*run), 1, "w.safetensors' is no file of this folder", "download it again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["export", "shrink"])
def test_a_companion_that_is_a_link_out_of_the_model_is_refused_at_once(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path / "secret", "mine")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(narrowed_folder, "prepare", lambda *_: pytest.fail("worked first"))
    run = (
        ["export", model, "--target", "hf", "-o", tmp_path / "out"]
        if verb == "export"
        else shrinking_of(model, text, tmp_path / "out", *NARROW)
    )
    refused(dotexport(*run), 1, "LICENSE is a link to", "outside of the model", "put a copy")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_the_models_own(
    dotexport: Command, model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    outcome = dotexport("export", snapshot, "--target", "hf", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out/hf/tokenizer.json").is_file()
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_integers_are_rounded_for_a_text(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "out"
    asked = ("export", model, "--target", "gguf:int8", "-o", out, "--calib", text)
    outcome = dotexport(*asked, "--calib-samples", 3, "--calib-seqlen", 32, "--json")
    assert outcome.code == 0, outcome.err
    assert "rounding weights for what they read" in outcome.err
    said = json.loads(outcome.out)["gguf-int8"]["calibration"]
    assert (said["text"], said["tokens"]) == (str(text), 96)
    assert dotexport("verify", out).code == 0
    # The next export to nearest takes the word back.
    assert dotexport("export", out, "--target", "gguf:int8", "--overwrite").code == 0
    assert "calibration" not in manifest.read(out)["artifacts"]["gguf-int8"]


def test_a_text_to_round_for_is_refused_where_it_says_nothing(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export = ("export", model, "-o", out, "--target")
    refused(dotexport(*export, "hf", "--calib", text), 2, "hf:as-stored", "without --calib")
    refused(dotexport(*export, "hf", "--calib-samples", 3), 2, "give --calib too")
    pytest.importorskip("gguf")
    refused(dotexport(*export, "gguf:int8", "--calib", tmp_path / "no.txt"), 1, "no.txt")
    assert not out.exists()


def test_a_recipe_rounds_those_of_its_exports_that_become_integers(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    out, asked = tmp_path / "out", {}
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    recipe = Recipe.parse(
        {
            "model": str(model),
            "shrink": {"calib": str(text)},
            "export": ["gguf:fp16", "gguf:int8"],
            "round": {"calib": str(text), "calib_samples": 4},
        },
        "recipe.yaml",
    )
    assert Recipe.parse(yaml.safe_load(recipe.dump()), "recipe.yaml") == recipe

    def export(out: Path, specs: list[str], *, read: object, **_: object) -> None:
        asked[tuple(specs)] = read is not None

    monkeypatch.setattr(exporting, "export", export)
    pipeline._export(recipe, out, lambda stage, done, total: None)
    assert asked == {("gguf:int8",): True, ("hf", "gguf:fp16"): False}
