"""Recipes: refused whole before the first step, taken up where they were stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dotexport.app import narrowed_folder, pipeline
from dotexport.exports import exporting
from dotexport.storage import manifest
from dotexport.targets import BUILT_IN

from .conftest import NARROW, Command, Copy, names, refused, shrinking_of, stopped, written


def recipe(file: Path, model: Path, text: Path, **steps: Any) -> Path:
    step = {"calib": str(text), "samples": 2, "seqlen": 32, "intermediate": 40}
    content = {"model": str(model), "shrink": step} | steps
    return written(file, yaml.safe_dump(content))


def ended(module: object, name: str) -> Callable[..., None]:
    """A step that ends the run; `_record` knows hf by then, and the copy stays unlisted."""
    step: Callable[..., None] = getattr(module, name)

    def end(*arguments: Any, **options: Any) -> None:
        if name == "_record" and arguments[1].target == "hf":
            return step(*arguments, **options)
        raise KeyboardInterrupt

    return end


@pytest.mark.parametrize(
    ("module", "name"),
    [(pipeline, "_export"), (exporting, "_record"), (pipeline, "evaluate_into")],
)
def test_a_recipe_goes_on_with_the_first_missing_step(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{Copy.__module__}:Copy")
    out = tmp_path / "out"
    quality = {"text": str(text), "samples": 2, "seqlen": 32}
    file = recipe(tmp_path / "r.yaml", model, text, export=["copy"], eval=quality)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, ended(module, name))
        assert dotexport("run", file, "-o", out).code == 130
    assert "quality" not in manifest.read(out)
    weights = (out / "hf" / "model.safetensors").stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrowed_folder, "prepare", lambda *_: pytest.fail("narrowed again"))
        outcome = dotexport("run", file, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    made = json.loads(outcome.out)
    assert made["quality"]["num_windows"] == 2
    assert made["artifacts"]["copy-plain"]["parity"]["passed"]
    assert (out / "hf" / "model.safetensors").stat() == weights


def test_a_recipe_goes_on_after_it_was_killed(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quality = {"text": str(text), "samples": 2, "seqlen": 32}
    run = ["run", recipe(tmp_path / "r.yaml", model, text, eval=quality), "-o", out]
    stopped(("dotexport.app.pipeline", "evaluate_into"), signal.SIGKILL, tmp_path / "there", run)
    assert manifest.read(out)["artifacts"]["hf"]["parity"]["passed"]
    monkeypatch.setattr(narrowed_folder, "prepare", lambda *_: pytest.fail("narrowed again"))
    assert dotexport(*run).code == 0
    assert manifest.read(out)["quality"]["num_windows"] == 2
    assert names(tmp_path) == ["model", "out", "r.yaml", "text.txt"]


def test_another_recipe_is_refused_over_an_output(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport("run", recipe(tmp_path / "a.yaml", model, text), "-o", out).code == 0
    quality = {"text": str(text), "seqlen": 32, "samples": 2}
    other = recipe(tmp_path / "b.yaml", model, text, eval=quality)
    outcome = dotexport("run", other, "-o", out)
    refused(outcome, 2, "made by another recipe", "another output folder, or --overwrite")
    assert dotexport("run", other, "-o", out, "--overwrite").code == 0
    assert "quality" in manifest.read(out)


def test_the_recipe_a_shrink_prints_is_the_one_it_records(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    printed = dotexport(*run, "--print-recipe")
    assert dotexport(*run).code == 0
    assert (tmp_path / "out" / "recipe.yaml").read_text() == printed.out


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ({"export": ["nope"]}, 2, ["no target is called 'nope'", "hf"]),
        ({"export": ["hf:int3"]}, 2, ["cannot write 'int3'"]),
        ({"bench": [{"target": "nope"}]}, 2, ["no target is called 'nope'"]),
        ({"bench": [{"target": "hf", "batch": 0}]}, 2, ["batch_size is 0", "at least 1"]),
        ({"bench": [{"target": "hf"}, {"target": "hf"}]}, 2, ["two bench steps measure hf"]),
        ({"eval": {"text": "/no/such.txt"}}, 1, ["/no/such.txt does not exist"]),
        ({"eval": {"text": "embedded:evaluation", "seqlen": 999}}, 2, ["context of 512"]),
        ({"bench": [{"target": "hf", "rounds": 1 << 70}]}, 2, ["rounds is", "at most"]),
        (
            {"export": ["ort-cpu"], "shrink": {"calib": "embedded:calibration", "heal": "soon"}},
            2,
            [],
        ),
        ({"export": ["gguf:int4-k"]}, 5, ["cannot be exported", "gguf:int4-k", "rows of 32"]),
        ({"unknown": 1}, 2, ["unknown key 'unknown'", "known: model, shrink"]),
        ({"shrink": {"calib": "a.txt,,b.txt"}}, 2, ["empty name"]),
    ],
)
def test_a_recipe_is_refused_before_anything_is_narrowed(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    steps: dict[str, Any],
    code: int,
    words: list[str],
) -> None:
    file = recipe(tmp_path / "r.yaml", model, text, **steps)
    refused(dotexport("run", file, "-o", tmp_path / "out"), code, *words)
    assert names(tmp_path) == ["model", "r.yaml", "text.txt"]
