"""Export and verify: what is kept, what is refused, and which planted faults are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.errors import (
    CheckpointError,
    ParityError,
    RuntimeMissingError,
    SizeError,
    UsageError,
)
from dotexport.exports.exporting import export
from dotexport.exports.parity import Parity
from dotexport.exports.reference import (
    Reference,
    compute_reference,
    rounded_to_4_bits,
    rounded_to_8_bits,
)
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check, require, verify
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32
from dotexport.storage import manifest
from dotexport.storage.locking import lock_file

pytest.importorskip("onnxruntime_genai")
ir: Any = pytest.importorskip("onnx_ir")

PRECISIONS = ["fp32", "int4"]
LINEAR = "model.layers.{}.mlp.{}_proj.MatMul.weight"


@pytest.fixture(scope="module")
def out(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "out"
    export(tiny_llama("wide-heads"), ["hf", "ort-cpu", "ort-cpu:int4"], out=folder)
    return folder


@pytest.fixture(scope="module")
def reference(out: Path) -> Reference:
    return compute_reference(Checkpoint.open(out / "hf"))


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "out"))


# --- what export leaves behind


def test_export_records_bytes_hashes_and_figures(out: Path) -> None:
    artifacts = manifest.read(out)["artifacts"]
    assert list(artifacts) == ["hf", "ort-cpu-fp32", "ort-cpu-int4"]
    for name, entry in artifacts.items():
        assert entry["parity"]["passed"] is True
        assert entry["files"] == manifest.hash_files(out / name)
        assert entry["bytes"] == sum(f.stat().st_size for f in (out / name).iterdir())
    report = json.loads((out / "reports" / "verify.json").read_text())
    assert list(report["artifacts"]) == list(artifacts)


def test_export_is_verified_again_from_the_folder_alone(out: Path) -> None:
    assert [(p.artifact, p.problems) for p in verify(out)] == [
        ("hf", ()),
        ("ort-cpu-fp32", ()),
        ("ort-cpu-int4", ()),
    ]


def test_some_artifacts_can_be_picked(out: Path) -> None:
    assert [p.artifact for p in verify(out, ["ort-cpu:int4"])] == ["ort-cpu-int4"]
    with pytest.raises(UsageError, match="cannot write 'int3'"):
        verify(out, ["ort-cpu:int3"])


class Wrong:
    """A target that writes another model than it was given."""

    name = "wrong"
    summary = "for tests"
    precisions = ("fp32",)
    exact_rounding = ()

    def __init__(self) -> None:
        self.inner: Any = find_target("hf")

    def missing(self) -> list[str]:
        return []

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        return ["it is too wide", "it is too deep"] if checkpoint.config.get("refuse") else []

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        self.inner.write(checkpoint, folder, precision)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))

    def open(self, folder: Path, *, threads: int | None = None) -> Any:
        return self.inner.open(folder, threads=threads)


@pytest.fixture
def wrong_target(monkeypatch: pytest.MonkeyPatch) -> type[Wrong]:
    from dotexport import targets

    monkeypatch.setitem(targets.BUILT_IN, "wrong", f"{__name__}:Wrong")
    monkeypatch.setattr("dotexport.exports.target.importlib.import_module", importing(__name__))
    return Wrong


def importing(here: str) -> Callable[[str], Any]:
    import importlib
    import types

    real = importlib.import_module
    module = types.SimpleNamespace(Wrong=Wrong)
    return lambda name: module if name == here else real(name)


def test_an_artifact_that_is_not_exact_is_not_kept(copied: Path, wrong_target: type) -> None:
    before = manifest.read(copied)
    with pytest.raises(ParityError, match="prefill: a logit differs from torch's by") as caught:
        export(copied, ["wrong"])
    assert caught.value.exit_code == 3
    assert not (copied / "wrong-fp32").exists()
    assert manifest.read(copied) == before
    assert not list(copied.glob(".*"))
    report = json.loads((copied / "reports" / "verify.json").read_text())
    assert report["artifacts"]["wrong-fp32"]["passed"] is False
    assert report["artifacts"]["ort-cpu-fp32"]["passed"] is True


def test_a_failing_artifact_does_not_stop_the_others(copied: Path, wrong_target: type) -> None:
    with pytest.raises(ParityError):
        export(copied, ["wrong", "ort-cpu"], overwrite=True)
    assert (copied / "ort-cpu-fp32" / "model.onnx").is_file()


def test_every_reason_against_a_model_is_listed(
    tiny_llama: Callable[[str], Path], tmp_path: Path, wrong_target: type
) -> None:
    model = Path(shutil.copytree(tiny_llama("wide-heads"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "refuse": True}))
    (model / "tokenizer.json").unlink()
    with pytest.raises(SizeError, match=r"(?s)too wide.*too deep.*no tokenizer"):
        export(model, ["wrong", "ort-cpu"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_runtime_names_the_command(
    copied: Path, wrong_target: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "missing", lambda self: ["pip install wrong"])
    with pytest.raises(RuntimeMissingError, match="pip install wrong"):
        export(copied, ["wrong"])


def test_an_artifact_is_replaced_only_on_request(copied: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite"):
        export(copied, ["ort-cpu"], verify=False)


def test_an_artifact_that_was_never_recorded_is_written_again(copied: Path) -> None:
    artifacts = manifest.read(copied)["artifacts"]
    manifest.update(copied, artifacts={"hf": artifacts["hf"]})
    lock_file(copied / "ort-cpu-fp32").touch()  # as a run leaves it that is killed in between
    export(copied, ["ort-cpu"], verify=False)
    assert list(manifest.read(copied)["artifacts"]) == ["hf", "ort-cpu-fp32"]


def test_a_plain_model_needs_a_folder_to_go_to(tiny_llama: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="-o"):
        export(tiny_llama("wide-heads"), ["hf"])


def test_an_output_takes_its_artifacts_into_itself(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="into itself"):
        export(copied / "hf", ["hf"], out=tmp_path / "elsewhere")
    [artifact] = export(copied / "hf", ["hf"])
    assert artifact.folder == copied / "hf"


# --- what verify finds


def test_a_changed_byte_is_found_by_name(copied: Path) -> None:
    config = copied / "ort-cpu-fp32" / "genai_config.json"
    config.write_text(config.read_text().replace("\n", " ", 1))  # as long as before
    (copied / "ort-cpu-int4" / "tokenizer.json").unlink()
    problems = {p.artifact: p.problems for p in verify(copied)}
    assert problems["hf"] == ()
    assert problems["ort-cpu-fp32"] == (
        "genai_config.json was changed after the export; export it again",
    )
    assert problems["ort-cpu-int4"] == ("tokenizer.json is missing; export it again",)
    known = manifest.read(copied)["artifacts"]
    assert not known["ort-cpu-fp32"]["parity"]["passed"]


def test_a_failure_is_raised_with_every_problem() -> None:
    bad = Parity("ort-cpu-fp32", "ort-cpu", "fp32", problems=("one thing", "another"))
    require([Parity("hf", "hf", "as-stored")])
    with pytest.raises(ParityError, match=r"(?s)ort-cpu-fp32.*one thing.*another"):
        require([bad])


def values(graph: Any, name: str) -> np.ndarray:
    return np.array(graph.initializers[name].const_value.numpy())


def put(graph: Any, name: str, array: np.ndarray) -> None:
    graph.initializers[name].const_value = ir.tensor(array, name=name)


def weight_name(graph: Any, layer: int, projection: str) -> str:
    """The float weight, or the scales of a rounded one: both carry the values' size."""
    name = LINEAR.format(layer, projection)
    return name if name in graph.initializers else f"{name}_scales"


def change_one_weight(graph: Any) -> None:
    """Not a matrix: one number of it (at int4, the scale of one block of 32)."""
    name = weight_name(graph, 1, "down")
    array = values(graph, name)
    array[0, 0] += 10 * array.std() + 10 * np.abs(array[0, 0])
    put(graph, name, array)


def swap_layers(graph: Any) -> None:
    names = [n for n in graph.initializers if n.startswith(LINEAR.format(0, "gate"))]
    for first in names:
        second = first.replace("layers.0", "layers.1")
        one, other = values(graph, first), values(graph, second)
        put(graph, first, other)
        put(graph, second, one)


def drop_the_mask(graph: Any) -> None:
    """Count every slot of the batch as a token: what a mask of ones, traced away, would do."""
    node = next(n for n in graph if n.op_type == "ReduceSum")
    mask = node.inputs[0]
    same = ir.node("Equal", [mask, mask])
    ones = ir.node("Cast", same.outputs, {"to": ir.DataType.INT64.value})
    graph.insert_before(node, [same, ones])
    node.replace_input_with(0, ones.outputs[0])


def stretch_positions(graph: Any) -> None:
    for name in ("cos_cache", "sin_cache"):
        array = values(graph, name)
        put(graph, name, np.repeat(array, 2, axis=0)[: len(array)])


def change_epsilon(graph: Any) -> None:
    for node in graph:
        if "epsilon" in node.attributes:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)


def change_attention_scale(graph: Any) -> None:
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            scale = node.attributes["scale"].as_float()
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.5 * scale)


def plant_nan(graph: Any) -> None:
    name = weight_name(graph, 2, "up")
    array = values(graph, name)
    array[0, 0] = np.nan
    put(graph, name, array)


def forget_nothing(graph: Any) -> None:
    """The control: rewriting a graph as it was must pass, or the faults below prove nothing."""


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    model = ir.load(folder / "model.onnx")
    change(model.graph)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    (folder / "model.onnx.data").unlink()
    ir.save(model, folder / "model.onnx")


FAULTS = [
    change_one_weight,
    swap_layers,
    drop_the_mask,
    stretch_positions,
    change_epsilon,
    change_attention_scale,
    plant_nan,
]


# Not NaN at int4: one such weight vanishes where its products are rounded to int8.
CASES = [(f, p) for f in [forget_nothing, *FAULTS] for p in PRECISIONS]
CASES.remove((plant_nan, "int4"))


@pytest.mark.parametrize(("fault", "precision"), CASES)
def test_a_fault_in_a_written_graph_is_found(
    fault: Callable[[Any], None], precision: str, copied: Path, reference: Reference
) -> None:
    folder = copied / f"ort-cpu-{precision}"
    rewritten(folder, fault)
    parity = check(find_target("ort-cpu"), precision, folder, reference, artifact="under test")
    assert parity.passed == (fault is forget_nothing), parity


# --- the yardstick itself


def test_the_reference_equals_the_model_that_transformers_loads(out: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).state_dict()
    for name, value in load_float32(Checkpoint.open(out / "hf")).state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_the_reference_is_the_same_each_time(out: Path, reference: Reference) -> None:
    again = compute_reference(Checkpoint.open(out / "hf"), rounded=False)
    for one, other in zip(again.sequences, reference.sequences, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_continuation_is_greedy(reference: Reference) -> None:
    triples = zip(reference.sequences, reference.prompt_lengths, reference.logits, strict=True)
    for tokens_L, length, logits_LV in triples:
        chosen = logits_LV[length - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(chosen, tokens_L[length:])


def test_a_short_context_shortens_the_prompts(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    reference = compute_reference(Checkpoint.open(tmp_path))
    assert max(map(len, reference.sequences)) <= 12
    assert reference.num_steps == 6


def test_a_tensor_that_config_does_not_know_is_refused(out: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(out / "hf", tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"does not know: model\.layers\.2"):
        load_float32(Checkpoint.open(folder))
    with pytest.raises(CheckpointError, match="unexpected keys"):
        find_target("hf").open(folder)


def test_rounding_to_4_bits_errs_by_half_a_step_and_keeps_the_largest() -> None:
    weight_OI = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    rounded_OI = rounded_to_4_bits(weight_OI)
    for row, after in zip(weight_OI, rounded_OI, strict=True):
        for start in (0, 32, 64):
            block, error = row[start : start + 32], (after - row)[start : start + 32].abs()
            largest = block[block.abs().argmax()]
            step = largest.abs() / 8
            assert error[block.abs().argmax()] < 1e-6
            # There are 16 levels, -8 to 7: the far side from the largest ends a step early.
            far = block * -largest.sign() > 7.5 * step
            assert error[~far].max() <= 0.5 * step + 1e-6
            assert error.max() <= step + 1e-6


def test_rounding_keeps_zeros_and_what_is_on_a_level() -> None:
    levels = torch.arange(-8.0, 8.0).repeat(2)[None]
    assert torch.equal(rounded_to_4_bits(levels), levels)
    assert torch.equal(rounded_to_4_bits(torch.zeros(1, 40)), torch.zeros(1, 40))
    assert torch.equal(rounded_to_8_bits(torch.zeros(2, 3, 40)), torch.zeros(2, 3, 40))


def test_rounding_to_8_bits_errs_by_half_a_step() -> None:
    x_LI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    step = x_LI.reshape(3, 2, 32).abs().amax(-1, keepdim=True) / 127
    error = (rounded_to_8_bits(x_LI) - x_LI).reshape(3, 2, 32).abs()
    assert torch.all(error <= 0.5 * step + 1e-6)


@pytest.mark.assets
def test_a_real_model_is_exported_exactly(assets: Path, tmp_path: Path) -> None:
    found = export(assets / "stories260k", ["hf", "ort-cpu", "ort-cpu:int4"], out=tmp_path / "o")
    stock, fp32, int4 = (artifact.parity for artifact in found)
    assert stock
    assert fp32
    assert int4
    assert stock.max_abs < 1e-4
    assert fp32.max_abs < 1e-4
    # int4 costs this tiny model much; what it computes is still exactly the rounded model.
    assert max(phase.rounding or 0 for phase in int4.phases.values()) < 0.01


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "chat_template.jinja", "deep/tokenizer.json", "notes.txt"]
)
def test_a_file_that_was_added_later_fails(copied: Path, name: str) -> None:
    file = copied / "hf" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    (parity,) = verify(copied, ["hf"])
    assert f"{name} was added after the export; remove it" in parity.problems
    file.unlink()
    (copied / "hf" / ".cache").mkdir()
    (copied / "hf" / ".cache" / "x").touch()  # which nobody reads
    assert verify(copied, ["hf"])[0].passed


def test_the_checkpoint_of_a_plain_export_is_hashed_though_nobody_asked_for_it(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_llama("wide-heads"), ["ort-cpu"], out=tmp_path / "out", verify=False)
    files = manifest.read(tmp_path / "out")["artifacts"]["hf"]["files"]
    assert files == manifest.hash_files(tmp_path / "out" / "hf")
    with (tmp_path / "out" / "hf" / "config.json").open("a") as stream:
        stream.write(" ")
    (parity,) = verify(tmp_path / "out", ["hf"])
    assert "config.json was changed" in "; ".join(parity.problems)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ort-cpu-fp32", {"precision": "int4"}),  # which would be held to less
        ("ort-cpu-fp32", {"precision": "any"}),
        ("hf", {"precision": "int4"}),
        ("hf", {"target": "ort-cpu", "precision": "fp32"}),
    ],
)
def test_precisions_that_are_not_those_of_the_artifact_are_refused(
    copied: Path, name: str, change: dict[str, str]
) -> None:
    artifacts = manifest.read(copied)["artifacts"]
    manifest.merge(copied, artifacts={name: artifacts[name] | change})
    with pytest.raises(CheckpointError, match=f"says that {name} is of target .* was edited"):
        verify(copied)
