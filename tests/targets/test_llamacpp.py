"""llama.cpp where it is installed: found by its library, asked for logits, its failures told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.exporting import export
from dotexport.exports.parity import measure
from dotexport.exports.reference import compute_reference
from dotexport.targets.llama_session import LlamaSession
from dotexport.targets.llamacpp import find_library, verify_llama_cpp

from .conftest import assert_measured_without_torch

pytest.importorskip("gguf")


def touched(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("no library")
    return file


@pytest.mark.parametrize(
    "name",
    ["libllama.so", "libllama.so.0", "libllama.v0.5.0.so", "libllama.dylib", "llama.dll"],
)
def test_the_library_is_found_under_the_names_that_releases_give_it(
    name: str, tmp_path: Path
) -> None:
    for other in ("libllama-common.so", "llama-server", "llama.h", "libggml.so"):
        touched(tmp_path / "build" / other)
    library = touched(tmp_path / "build" / name)
    assert find_library(tmp_path) == library
    assert find_library(library) == library
    assert find_library(tmp_path / "build" / "llama-server") == library


def test_a_program_has_its_library_in_lib_beside_bin(tmp_path: Path) -> None:
    program = touched(tmp_path / "bin" / "llama-cli")
    library = touched(tmp_path / "lib" / "libllama.so")
    assert find_library(program) == library


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="holds no library of llama") as caught:
        find_library(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.fixture(scope="module")
def out(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamacpp") / "out"
    export(tiny_llama("wide-heads"), ["gguf", "gguf:int8"], out=folder, verify=False)
    return folder


def test_what_does_not_load_is_quoted(out: Path, tmp_path: Path) -> None:
    touched(tmp_path / "libllama.so")
    with pytest.raises(RuntimeMissingError, match="cannot be used"):
        verify_llama_cpp(out, tmp_path)


def test_an_output_without_gguf_is_a_matter_of_usage(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_llama("wide-heads"), ["hf"], out=tmp_path / "out", verify=False)
    touched(tmp_path / "libllama.so")
    with pytest.raises(UsageError, match="--target gguf"):
        verify_llama_cpp(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("flags", [["--target", "llama.cpp"], ["--llama-cpp", "folder"]])
def test_target_and_folder_belong_together(out: Path, flags: list[str]) -> None:
    done = CliRunner().invoke(app, ["verify", str(out), *flags])
    assert "together, or neither" in str(done.exception)


@pytest.mark.llamacpp
def test_every_gguf_file_of_an_output_is_run_and_reported(out: Path, llama_cpp: Path) -> None:
    flags = ["--target", "llama.cpp", "--llama-cpp", str(llama_cpp.parent), "--json"]
    done = CliRunner().invoke(app, ["verify", str(out), *flags])
    assert done.exit_code == 0
    assert [one["passed"] for one in json.loads(done.stdout)] == [True, True]
    report = json.loads((out / "reports" / "verify.json").read_text())["artifacts"]
    assert {"gguf-fp16-llama.cpp", "gguf-int8-llama.cpp"} <= set(report)


@pytest.mark.llamacpp
def test_a_file_that_ends_too_early_fails_with_the_words_of_llama_cpp(
    tiny_llama: Callable[[str], Path], llama_cpp: Path, tmp_path: Path
) -> None:
    export(tiny_llama("wide-heads"), ["gguf"], out=tmp_path / "out", verify=False)
    file = tmp_path / "out" / "gguf-fp16" / "model.gguf"
    file.write_bytes(file.read_bytes()[:-5000])
    [parity] = verify_llama_cpp(tmp_path / "out", llama_cpp)
    changed, spoilt = parity.problems
    assert "changed after the export" in changed
    assert "it cannot be run: llama.cpp ended" in spoilt
    assert "model is corrupted or incomplete" in spoilt


# In the measuring process itself -----------------------------------------------------------------


@pytest.mark.llamacpp
def test_the_session_that_is_timed_computes_what_torch_computes(out: Path, llama_cpp: Path) -> None:
    from dotexport.models.checkpoint import Checkpoint

    reference = compute_reference(Checkpoint.open(out / "hf"), rounded=False)
    session = LlamaSession(llama_cpp, out / "gguf-fp16" / "model.gguf", threads=1)
    parity = measure(session, reference, artifact="gguf", target="gguf", precision="fp16")
    assert parity.problems == ()
    assert "llama.cpp" in session.providers[0]


@pytest.mark.llamacpp
def test_a_cache_that_is_used_again_forgets_and_lean_answers_are_the_last_rows(
    out: Path, llama_cpp: Path
) -> None:
    file = out / "gguf-fp16" / "model.gguf"
    prompt_BL, other_BL = np.random.default_rng(0).integers(0, 80, (2, 2, 7))
    session = LlamaSession(llama_cpp, file, threads=1, capacity=8)
    first_BLV, first_BV = session.start(prompt_BL), session.step(prompt_BL[:, 0])
    session.start(other_BL)
    np.testing.assert_array_equal(session.start(prompt_BL), first_BLV)
    lean = LlamaSession(llama_cpp, file, threads=1, capacity=8, lean=True)
    np.testing.assert_array_equal(lean.start(prompt_BL), first_BLV[:, -1:])
    np.testing.assert_array_equal(lean.step(prompt_BL[:, 0]), first_BV)
    with pytest.raises(UsageError, match="9 tokens does not fit a cache of 8"):
        lean.step(prompt_BL[:, 0])


@pytest.mark.llamacpp
def test_a_process_that_measures_llama_cpp_holds_no_torch(out: Path, llama_cpp: Path) -> None:
    where = {"llama_cpp": str(llama_cpp)}
    assert_measured_without_torch(target="gguf", folder=str(out / "gguf-fp16"), runtime=where)


@pytest.mark.llamacpp
def test_bench_times_llama_cpp_and_says_so(out: Path, llama_cpp: Path, tmp_path: Path) -> None:
    short = "--rounds 1 --min-iterations 4 --min-seconds 0 --warmups 0 --threads 1"
    sizes = ["--prompt", "4", "--generate", "4"]
    flags = ["--target", "gguf", "--precision", "int8", "--llama-cpp", str(llama_cpp.parent)]
    report = tmp_path / "bench.json"
    asked = ["bench", str(out), "--baseline", str(out / "hf"), *flags, *sizes, *short.split()]
    done = CliRunner().invoke(app, [*asked, "-o", str(report)])
    assert done.exit_code == 0, done.exception
    content = json.loads(report.read_text())
    for side in ("candidate", "baseline"):
        assert content[side]["providers"][0].startswith("llama.cpp")
    # Of every weight at most once, so of no more bytes than the file has.
    read = content["roofline"]["candidate"]["prefill"]["num_bytes"]
    assert 0 < read < content["candidate"]["artifact_bytes"]


def test_a_recipe_is_refused_before_it_narrows_anything(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    bench = {"target": "gguf", "llama_cpp": str(tmp_path)}
    steps = {"shrink": {"calib": "embedded:calibration", "params": "0.7x"}, "bench": [bench]}
    recipe.write_text(json.dumps({"model": "embedded", **steps}))  # JSON is YAML
    done = CliRunner().invoke(app, ["run", str(recipe), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, RuntimeMissingError)
    assert "holds no library" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_bench_refuses_a_folder_without_llama_cpp_and_other_targets(
    out: Path, tmp_path: Path
) -> None:
    asked = ["bench", str(out), "--baseline", str(out / "hf"), "--llama-cpp", str(tmp_path)]
    done = CliRunner().invoke(app, [*asked, "--target", "gguf", "--precision", "int8"])
    assert isinstance(done.exception, RuntimeMissingError)
    assert "holds no library" in str(done.exception)
    done = CliRunner().invoke(app, [*asked, "--target", "onnx"])
    assert isinstance(done.exception, UsageError)
    assert "llama_cpp" in str(done.exception)
