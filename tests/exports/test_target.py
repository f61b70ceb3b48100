"""Targets are found by name, and nothing is imported before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.target import find_target, list_targets, parse_spec, resolve, target_names


@pytest.mark.parametrize(
    ("spec", "parts"),
    [("hf", ("hf", None)), ("ort-cpu:int4", ("ort-cpu", "int4"))],
)
def test_a_spec_is_a_name_and_perhaps_a_precision(spec: str, parts: tuple[str, str | None]) -> None:
    assert parse_spec(spec) == parts


@pytest.mark.parametrize("spec", ["", ":int4", "ort-cpu:", "a:b:c", "two words"])
def test_what_is_no_spec_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="NAME:PRECISION"):
        parse_spec(spec)


def test_a_spec_without_precision_takes_the_default() -> None:
    assert resolve("ort-cpu")[1] == "fp32"
    assert resolve("hf")[1] == "as-stored"


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'ort-cpo'.*hf, ort-cpu"):
        find_target("ort-cpo")


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="it writes fp32, fp16, int4"):
        resolve("ort-cpu:fp8")


def test_every_target_is_listed_with_what_it_is() -> None:
    rows = {row.name: row for row in list_targets()}
    assert list(rows) == target_names()
    assert all(row.summary and row.precisions for row in rows.values() if not row.missing)


def installed(folder: Path, line: str) -> Path:
    """A package on the path that adds a target."""
    info = folder / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dotexport.targets]\n{line}\n")
    return folder


def test_another_package_adds_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "theirs = their_module:Theirs")
    (tmp_path / "their_module.py").write_text(
        "class Theirs:\n"
        "    name, summary, precisions, exact_rounding = 'theirs', 'one', ('fp32',), ()\n"
        "    def missing(self): return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert target_names()[-1] == "theirs"
    assert find_target("theirs").precisions == ("fp32",)


def test_another_package_cannot_replace_a_built_in_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, "hf = their_module:Theirs"))
    assert find_target("hf").summary.startswith("stock")


def test_a_target_whose_file_cannot_be_imported_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, "broken = no_such_module:Theirs"))
    with pytest.raises(RuntimeMissingError, match="no_such_module"):
        find_target("broken")
    assert "no_such_module" in list_targets()[-1].missing[0]


def test_the_core_imports_no_runtime() -> None:
    code = (
        "import sys, dotexport, dotexport.exports.exporting, dotexport.exports.verifying\n"
        "heavy = {'onnxruntime', 'onnxruntime_genai', 'onnx', 'transformers', 'vllm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
