"""The doctor verb: what it sees, what it objects to, and the commands it gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.exports.target import target_names
from dotexport.targets import doctor
from dotexport.targets.doctor import clashes, examine


def test_two_builds_of_one_runtime_are_a_clash_with_the_command_that_mends_it() -> None:
    [finding] = clashes({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1", "torch": "2.13.0"})
    assert "overwrite each other" in finding.problem
    assert finding.mend == (
        "pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime-gpu"
    )


def test_every_clash_is_listed() -> None:
    packages = {
        "onnxruntime": "1",
        "onnxruntime-gpu": "1",
        "onnxruntime-genai": "1",
        "onnxruntime-genai-cuda": "1",
        "optimum-onnx": "0.1.0",
        "transformers": "5.23.0",
    }
    assert len(list(clashes(packages))) == 3
    assert not list(clashes({"optimum-onnx": "0.1.0", "transformers": "4.57.6"}))


def test_this_environment_is_described() -> None:
    seen = examine()
    assert [row.name for row in seen.targets] == target_names()
    assert seen.packages["torch"]
    assert seen.providers["torch"][0] == "cpu"
    json.dumps(seen.as_dict())


def test_a_runtime_that_does_not_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise OSError("libonnxruntime.so: cannot open\nand more")

    monkeypatch.setattr(doctor, "_onnxruntime", broken)
    [finding] = [f for f in examine().findings if "onnxruntime" in f.problem]
    assert finding.problem.endswith("cannot be loaded: libonnxruntime.so: cannot open")
    assert "--force-reinstall" in finding.mend


@pytest.mark.parametrize(("found", "code"), [([], 0), ([doctor.Finding("broken", "mend")], 6)])
def test_the_verb_says_it_all_and_ends_with_6_if_something_is_broken(
    found: list[Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "clashes", lambda packages: iter(found))
    plain, as_json = (CliRunner().invoke(app, ["doctor", *flag]) for flag in ([], ["--json"]))
    assert (plain.exit_code, as_json.exit_code) == (code, code)
    document = json.loads(as_json.stdout)
    assert document["healthy"] is (not found)
    assert {"environment", "packages", "providers", "targets", "findings"} < set(document)
    assert "onnxruntime" in plain.stdout
    assert ("mend" in plain.stdout) is bool(found)
