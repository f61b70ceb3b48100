"""Verbs on what is no output, and on outputs whose records are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dotexport.storage import manifest

from .conftest import NARROW, Command, names, refused, shrinking_of, written


@pytest.mark.parametrize(
    ("verb", "code", "words"),
    [
        (["verify", "{}"], 1, ["is not an output of dotexport", "shrink -o"]),
        (
            ["eval", "{}", "--baseline", "{}", "--text", "embedded:evaluation"],
            1,
            ["is not an output of dotexport", "shrink -o"],
        ),
        (["export", "{}", "--target", "hf"], 2, ["plain model folder", "-o"]),
        (["export", "{}", "--target", "nope"], 2, ["no target is called 'nope'", "hf"]),
        (["bench", "{}", "--target", "nope", "--noise-check"], 2, ["no target is called 'nope'"]),
    ],
)
def test_a_plain_folder_is_no_output(
    dotexport: Command, model: Path, tmp_path: Path, verb: list[str], code: int, words: list[str]
) -> None:
    before = names(model)
    refused(dotexport(*(part.format(model) for part in verb)), code, *words)
    assert names(model) == before
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("verb", "code", "message"),
    [
        (["verify"], 1, "none is not an output of dotexport"),
        (
            ["eval", "--baseline", "embedded", "--text", "embedded:evaluation"],
            1,
            "none is not an output of dotexport",
        ),
        (["export", "--target", "hf"], 1, "none is not a model folder"),
        (["bench", "--noise-check", "--target", "hf"], 2, "none is no folder; expected"),
    ],
)
def test_a_folder_that_does_not_exist_is_refused(
    dotexport: Command, tmp_path: Path, verb: list[str], code: int, message: str
) -> None:
    refused(dotexport(verb[0], tmp_path / "none", *verb[1:]), code, message)
    assert names(tmp_path) == []


def test_a_damaged_manifest_is_named(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    written(out / manifest.MANIFEST, "{")
    refused(dotexport("verify", out), 1, "dotexport.json is not valid JSON")


SHAPES: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "a text": "x",
    "a number": 7,
    "a deep list": [[[[{}]]]],
    "an object": {"x": {"y": []}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "section",
    [
        *("artifacts", "source", "sizes", "shrink", "calibration", "quality", "bench", "served"),
        *("environment", "healing", "latency", "recipe", "architecture", "kind"),
    ],
)
def test_a_manifest_of_any_shape_is_read_or_refused(
    dotexport: Command, shrunk: Path, section: str, shape: str
) -> None:
    file = shrunk / manifest.MANIFEST
    written(file, json.dumps(json.loads(file.read_text()) | {section: SHAPES[shape]}))
    for verb in (["report", shrunk], ["verify", shrunk, "--target", "nope"]):
        outcome = dotexport(*verb)
        assert outcome.code in (0, 1, 2), outcome
        assert "did not expect" not in outcome.err


def test_a_damaged_report_of_verification_is_started_again(
    dotexport: Command, shrunk: Path
) -> None:
    for content in ("{", "[]", '{"artifacts": 7}', "[" * 9999):
        written(shrunk / "reports" / "verify.json", content)
        assert dotexport("verify", shrunk).code == 0
        told = json.loads((shrunk / "reports" / "verify.json").read_text())
        assert told["artifacts"]["hf"]["passed"]
