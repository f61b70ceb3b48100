"""Pruned pipelines in ONNX Runtime: every class, two batch sizes, two picture sizes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.diffusion import graphs, onnx_folder
from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.diffusion.sampling import component_of, load, sample
from dotexport.errors import ParityError, UnsupportedModelError, UsageError
from dotexport.exports.verifying import require
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

pytest.importorskip("onnxscript", reason="needs the extra [diffusion]")
Tiny = Callable[[str], Path]


LARGE = [pytest.param(name, marks=pytest.mark.heavy) for name in ("pixart", "sd3", "sdxl")]


@pytest.mark.parametrize("name", ["flux", "dit", "unet", *LARGE])
def test_a_pruned_pipeline_runs_in_onnx_runtime(name: str, exported: Callable[[str], Path]) -> None:
    out = exported(name)
    parity = manifest.read(out)["artifacts"]["onnx-fp32"]["parity"]
    assert parity["passed"]
    assert parity["step"] <= 1e-4
    assert parity["trajectory"] <= 1e-3
    assert len(set(parity["cases"])) == 2
    assert (parity["cases"][1].endswith("8 px")) == (name not in ("dit", "pixart"))
    folder = out / "onnx-fp32"
    pipe = load(out / "pipeline")
    for part in graphs.parts(pipe):
        assert (folder / part.folder / "model.onnx").is_file()
        assert (folder / part.folder / "config.json").is_file()
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    assert (folder / "model_index.json").is_file()


def test_tokenizers_are_named_for_both_transformers(tmp_path: Path) -> None:
    """A tokenizer that is one tokenizer.json gets a class of 4 and 5; others keep their own."""
    source, made = tmp_path / "pipeline", tmp_path / "made"
    index = {"tokenizer": ["transformers", "TokenizersBackend"]}
    index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    for name, (_, kind) in index.items():
        (source / name).mkdir(parents=True)
        (source / name / "tokenizer.json").write_text("{}")
        write_json(source / name / "tokenizer_config.json", {"tokenizer_class": kind, "x": 1})
    (source / "tokenizer_2" / "vocab.json").write_text("{}")
    write_json(source / "model_index.json", index)
    made.mkdir()
    onnx_folder._companions(SimpleNamespace(), source, made)
    named = read_json(made / "model_index.json", advice="")
    configs = [read_json(made / name / "tokenizer_config.json", advice="") for name in index]
    assert named == index | {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    assert configs[0] == {"tokenizer_class": "PreTrainedTokenizerFast", "x": 1}
    assert configs[1] == {"tokenizer_class": "CLIPTokenizer", "x": 1}
    # What the user has stays as it is.
    assert read_json(source / "model_index.json", advice="") == index


def test_sessions_do_the_work_while_they_are_in_place(exported: Callable[[str], Path]) -> None:
    """With the module's own weights destroyed, the pipeline still says what it said."""
    out = exported("dit")
    pipe = load(out / "pipeline")
    options = SampleOptions(prompts="", steps=2, guidance=1.0)
    expected = sample(pipe, [1, 2], 0, options)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.zero_()
    with graphs.in_place(pipe, out / "onnx-fp32"):
        found = sample(pipe, [1, 2], 0, options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(pipe, [1, 2], 0, options), expected)


def test_a_spoilt_graph_fails_verification(exported: Callable[[str], Path], tmp_path: Path) -> None:
    import onnx

    out = tmp_path / "out"
    shutil.copytree(exported("dit"), out)
    file = out / "onnx-fp32" / "transformer" / "model.onnx"
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            spoilt = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(spoilt, tensor.name))
    onnx.save(model, file)
    for data in file.parent.glob("*.data"):
        data.unlink()
    (parity,) = onnx_folder.verify(out)
    assert any("one call differs" in problem for problem in parity.problems)
    assert any("changed after the export" in problem for problem in parity.problems)
    with pytest.raises(ParityError, match="onnx-fp32"):
        require([parity])
    assert not manifest.read(out)["artifacts"]["onnx-fp32"]["parity"]["passed"]


def test_an_artifact_that_fails_is_not_kept(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "out", exported("dit")
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("onnx-fp32"))
    manifest.update(out, artifacts={})

    def copied(pipe: Any, source: Path, folder: Path, *rest: Any) -> None:
        shutil.copytree(made / "onnx-fp32", folder, dirs_exist_ok=True)

    monkeypatch.setattr(onnx_folder, "write_graphs", copied)
    monkeypatch.setattr(onnx_folder, "STEP_LIMIT", -1.0)
    with pytest.raises(ParityError, match="not kept"):
        onnx_folder.export(out, ["onnx"])
    assert not (out / "onnx-fp32").exists()
    assert manifest.read(out)["artifacts"] == {}
    monkeypatch.setattr(onnx_folder, "STEP_LIMIT", 1e-4)
    assert onnx_folder.export(out, ["onnx:fp32"]) == ["onnx-fp32"]


def test_other_targets_and_places_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnx:fp16"):
        onnx_folder.export(tiny("dit"), ["ort-cpu"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="-o"):
        onnx_folder.export(tiny("dit"), ["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_torch_cannot_trace_is_named(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(exported("dit") / "pipeline")
    part = next(part for part in graphs.parts(pipe) if part.folder == "transformer")
    call = onnx_folder.record(pipe, onnx_folder.cases(pipe, {})[0])["transformer"]
    forward = pipe.transformer.forward

    def asks_for_values(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        assert bool(made.sample.isfinite().all())
        return made

    monkeypatch.setattr(pipe.transformer, "forward", asks_for_values)
    with pytest.raises(UnsupportedModelError, match=r"transformer .* cannot be written as ONNX"):
        graphs.write(pipe.transformer, part, call, call, tmp_path)


@pytest.mark.parametrize("name", ["dit", LARGE[1]])
def test_float16_is_close_and_half_as_large(
    name: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported(name), out)
    assert onnx_folder.export(out, ["onnx:fp16"]) == ["onnx-fp16"]
    made = manifest.read(out)["artifacts"]["onnx-fp16"]
    assert made["parity"]["passed"]
    # As far apart as float16 makes torch itself; a time rounded to float16 would give 0.05.
    assert 1e-5 < made["parity"]["step"] < 5e-3
    folders = [
        out / f"onnx-{precision}" / component_of(load(out / "pipeline"))
        for precision in ("fp16", "fp32")
    ]
    sizes = [weights(folder / "model.onnx") for folder in folders]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.02)


def weights(file: Path) -> int:
    """Bytes of the floating-point tensors of a graph."""
    import onnx

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    sizes = {half: 2, single: 4}
    return sum(
        sizes.get(tensor.data_type, 0) * int(np.prod(tensor.dims))
        for tensor in onnx.load(file).graph.initializer
    )
