"""Artifacts with weights rounded for a text: as many bytes, verified, and no way around it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.errors import ParityError, UsageError
from dotexport.exports.calibrating import Text, digest
from dotexport.exports.exporting import export
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check, chosen_for, require, verify, with_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage import manifest

pytest.importorskip("onnxruntime_genai")
gguf: Any = pytest.importorskip("gguf")
onnx: Any = pytest.importorskip("onnx")

SPECS = ["ort-cpu:int4", "gguf:int4", "gguf:int8", "onnx:int4"]
NAMES = [spec.replace(":", "-") for spec in SPECS]
# The one in the first layer whose rows fill blocks in every format.
PROBED = "model.layers.0.self_attn.o_proj"


def read(checkpoint: Checkpoint) -> Text:
    random = torch.Generator().manual_seed(0)
    windows_NL = torch.randint(checkpoint.config["vocab_size"], (8, 32), generator=random)
    return Text(windows_NL, {"text": "drawn", "tokens": windows_NL.numel()})


@pytest.fixture(scope="module")
def out(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "out"
    export(tiny_llama("wide-heads"), SPECS, out=folder, read=read)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "out"
    export(tiny_llama("wide-heads"), SPECS[1:], out=folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def reference(out: Path) -> Reference:
    return compute_reference(Checkpoint.open(out / "hf"))


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "out"))


def entries(out: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = manifest.read(out)["artifacts"]
    return found


def look(out: Path, name: str, reference: Reference, entry: Mapping[str, Any]) -> None:
    """As verify does, with what it remembers of the file's hashes left away."""
    target, checkpoint = find_target(entry["target"]), Checkpoint.open(out / "hf")
    chosen = chosen_for(checkpoint, entry)
    asked = target, entry["precision"], out / name, reference
    parity = check(*asked, artifact=name, chosen=chosen)
    require([with_text(parity, target, out / name, checkpoint, chosen)])


def test_it_takes_as_many_bytes_and_is_nearer_on_the_text(out: Path, plain: Path) -> None:
    ours, theirs = entries(out), entries(plain)
    assert all("calibration" not in entry for entry in theirs.values())
    for name in NAMES:
        # The graph of ort-cpu is filled in place.
        assert ours[name]["bytes"] == theirs.get(name, ours[name])["bytes"]
        record = ours[name]["calibration"]
        assert record["text"] == "drawn"
        assert record["tokens"] == 256
        for said in record["tensors"].values():
            assert 0 < said["loss"] <= said["nearest"]
        summed = [sum(t[key] for t in record["tensors"].values()) for key in ("loss", "nearest")]
        assert summed[0] < 0.8 * summed[1]


def test_verify_passes_it_and_holds_its_runtime_to_what_the_file_says(out: Path) -> None:
    assert all(parity.passed for parity in verify(out))


@pytest.mark.parametrize("name", NAMES)
def test_without_its_record_it_is_held_to_rounding_to_nearest(
    name: str, out: Path, reference: Reference
) -> None:
    entry = {k: v for k, v in entries(out)[name].items() if k != "calibration"}
    if name == "gguf-int8":  # whose own error is what the reader of files allows
        look(out, name, reference, entry)
        return
    with pytest.raises(ParityError):
        look(out, name, reference, entry)


def _weights(folder: Path) -> tuple[Any, Callable[[], None]]:
    """The bytes of one matrix, (rows, bytes), to be changed in place; and how to store them."""
    if (folder / "model.gguf").is_file():
        reader = gguf.GGUFReader(folder / "model.gguf", "r+")
        [tensor] = [t for t in reader.tensors if t.name == "blk.0.attn_output.weight"]
        return tensor.data, reader.data.flush
    if (portable := folder / "onnx/model_q4.onnx").is_file():
        model = onnx.load(portable)
        [found] = [t for t in model.graph.initializer if t.name == f"{PROBED}.weight_levels"]
        array = onnx.numpy_helper.to_array(found).copy()

        def store() -> None:
            found.CopyFrom(onnx.numpy_helper.from_array(array, found.name))
            onnx.save(model, portable)

        return array.reshape(len(array), -1), store
    model = onnx.load(folder / "model.onnx")
    [found] = [
        t
        for t in model.graph.initializer
        if t.name == f"{PROBED.replace('self_', '')}.MatMul.weight_Q4"
    ]
    array = onnx.numpy_helper.to_array(found).copy()

    def save() -> None:
        found.CopyFrom(onnx.numpy_helper.from_array(array, found.name))
        (folder / "model.onnx.data").unlink(missing_ok=True)
        onnx.save(
            model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data"
        )

    return array.reshape(len(array), -1), save


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_weight_is_found_and_named(
    name: str, copied: Path, reference: Reference
) -> None:
    rows, save = _weights(copied / name)
    rows[3, 5] ^= 1
    save()
    with pytest.raises(ParityError, match=rf"{PROBED}.weight: its values are not those"):
        look(copied, name, reference, entries(copied)[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_was_changed_with_the_file_saves_no_row_that_is_far_off(
    name: str, copied: Path, reference: Reference
) -> None:
    rows, save = _weights(copied / name)
    rows[[1, 2]] = rows[[2, 1]]
    save()
    entry = entries(copied)[name]
    target, checkpoint = find_target(entry["target"]), Checkpoint.open(copied / "hf")
    ask: Any = target
    for tensor, values_OI in ask.values(checkpoint, copied / name):
        if tensor in entry["calibration"]["tensors"]:
            entry["calibration"]["tensors"][tensor]["sha256"] = digest(values_OI)
    with pytest.raises(ParityError, match=rf"{PROBED}.weight: 2 of .* rows are further"):
        look(copied, name, reference, entry)


def test_a_matrix_that_the_record_leaves_out_is_not_taken_on_trust(
    copied: Path, reference: Reference
) -> None:
    entry = entries(copied)["ort-cpu-int4"]
    del entry["calibration"]["tensors"][f"{PROBED}.weight"]
    with pytest.raises(ParityError, match=rf"{PROBED}.weight: its values are not those"):
        look(copied, "ort-cpu-int4", reference, entry)


def test_a_file_that_lost_what_was_chosen_is_found(
    copied: Path, plain: Path, reference: Reference
) -> None:
    """A writer that takes no notice of the rounding leaves one to nearest."""
    for name in NAMES[1:]:
        shutil.rmtree(copied / name)
        shutil.copytree(plain / name, copied / name)
        with pytest.raises(ParityError, match="not those that were chosen"):
            look(copied, name, reference, entries(copied)[name])


@pytest.mark.parametrize("spec", ["hf", "ort-cpu:fp32", "gguf:fp16"])
def test_what_is_not_rounded_is_refused_before_anything_is_written(
    spec: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{spec}.* without --calib"):
        export(tiny_llama("wide-heads"), [spec], out=tmp_path / "out", read=read)
    assert not (tmp_path / "out").exists()


@pytest.mark.llamacpp
def test_llama_cpp_runs_it(out: Path, llama_cpp: Path) -> None:
    from dotexport.targets.llamacpp import verify_llama_cpp

    assert all(parity.passed for parity in verify_llama_cpp(out, llama_cpp))


def test_bytes_of_levels_are_those_of_the_package() -> None:
    from dotexport.merging.rounding import nearest
    from dotexport.targets.ggml_blocks import GRIDS, pack

    random = np.random.default_rng(0)
    for kind, grid in GRIDS.items():
        rounded, values_OI = nearest(torch.from_numpy(random.normal(size=(5, 512))).float(), grid)
        back_OI = gguf.dequantize(pack(rounded, kind), kind)
        np.testing.assert_array_equal(back_OI, values_OI.numpy())
