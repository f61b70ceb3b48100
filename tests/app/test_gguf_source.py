"""A GGUF file where a verb takes MODEL."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dotexport import embedded
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint

from .conftest import Command, refused, written

pytest.importorskip("gguf")
FAST = ("--samples", 4, "--seqlen", 64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in Q8_0."""
    home = tmp_path_factory.mktemp("file")
    find_target("gguf").write(Checkpoint.open(embedded.MODEL_DIR), home, "int8")
    return (home / "model.gguf").rename(home / "small.Q8_0.gguf")


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    return written(tmp_path / "text.txt", "The cat sat on the mat and looked at a dog. " * 60)


def test_plan_reads_a_header_and_unpacks_no_weights(
    dotexport: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcomes = [dotexport("plan", m, "--params", "0.9x", "--json") for m in (file, "embedded")]
    of_file, of_folder = (json.loads(outcome.out) for outcome in outcomes)
    assert of_file["hidden_size"] == of_folder["hidden_size"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_file_is_not_replaced_by_what_comes_out_of_it(
    dotexport: Command, file: Path, prose: Path, tmp_path: Path
) -> None:
    """Though it was unpacked elsewhere."""
    out = tmp_path / "out"
    asked = ("--intermediate", 384, "--calib", prose, *FAST, "--heal", "none")
    assert dotexport("shrink", file, "-o", out, *asked).code == 0
    inside = Path(shutil.copy(file, out / "small.gguf"))
    outcome = dotexport("shrink", inside, "-o", out, *asked, "--overwrite")
    refused(outcome, 2, "lies inside the output", "another output folder")
    recipe = written(tmp_path / "r.yaml", f"model: {inside}\nshrink: {{intermediate: 384}}\n")
    refused(dotexport("run", recipe, "-o", out, "--overwrite"), 2, "lies inside the output")
    assert inside.read_bytes() == file.read_bytes()


def test_a_file_is_narrowed_told_of_and_a_baseline(
    dotexport: Command, file: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("--params", "0.9x", "--calib", prose, *FAST, "--heal", "none", "--basis", "pca")
    assert dotexport("shrink", file, "-o", out, *asked).code == 0
    source = json.loads((out / "dotexport.json").read_text())["source"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source["model"] == "small.Q8_0"
    assert source["sha256"] == {file.name: digest}
    assert "small.Q8_0" in (out / "README.md").read_text()
    config = json.loads((out / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    asked = ("--baseline", file, "--text", "embedded:evaluation", *FAST, "--json")
    outcome = dotexport("eval", out, *asked)
    assert outcome.code == 0, outcome
    judged = json.loads(outcome.out)
    assert 0 < judged["kl"] < 5


def test_a_file_is_exported_and_keeps_what_it_computes(
    dotexport: Command, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    refused(dotexport("export", file, "--target", "gguf"), 2, "give an output folder with -o")
    assert dotexport("export", file, "--target", "gguf:int8", "-o", out).code == 0
    # What Q8_0 gives back is what Q8_0 keeps: the weights do not move.
    gguf = pytest.importorskip("gguf")
    before, after = (gguf.GGUFReader(f) for f in (file, out / "gguf-int8" / "model.gguf"))
    for one, other in zip(before.tensors, after.tensors, strict=True):
        pair = [torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in (one, other)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=0)


def test_a_file_that_is_none_is_refused(dotexport: Command, file: Path, tmp_path: Path) -> None:
    words = written(tmp_path / "words.gguf", "no model")
    refused(dotexport("plan", words, "--params", "0.9x"), 1, "words.gguf is no GGUF file")
    cut = written(tmp_path / "cut.gguf", file.read_bytes()[:-100])
    refused(dotexport("plan", cut, "--params", "0.9x"), 1, "cut.gguf", "download complete")
    refused(dotexport("export", cut, "--target", "hf", "-o", tmp_path / "o"), 1, "cut.gguf")
    named = shutil.copy(file, tmp_path / "nameless")  # as other programs store them
    assert dotexport("plan", named, "--params", "0.9x").code == 0


def test_without_the_gguf_package_the_extra_is_named(
    dotexport: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("dotexport.models.ggml.ggml_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    outcome = dotexport("plan", file, "--params", "0.9x")
    refused(outcome, 6, "needs the gguf package; pip install 'dotexport[gguf]'")
