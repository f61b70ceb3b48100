"""ort-cuda: what is written anywhere, what is said of it without a GPU, and what a GPU runs.

Tests without a GPU pretend that there is none wherever they run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.axes.plan import SizeOptions
from dotexport.errors import RuntimeMissingError
from dotexport.exports.exporting import export
from dotexport.exports.parity import Parity
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import find_target, list_targets
from dotexport.exports.verifying import rehearse, require, verify
from dotexport.models.checkpoint import Checkpoint
from dotexport.outputs import card, summary
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.planning import choose
from dotexport.storage import manifest
from dotexport.targets import cuda, doctor

pytest.importorskip("onnxruntime_genai")
ort: Any = pytest.importorskip("onnxruntime")
ir: Any = pytest.importorskip("onnx_ir")

PRECISIONS = ["fp16", "bf16", "fp32", "int4"]
NO_GPU = ["a GPU; use a machine with one"]


@pytest.fixture(scope="module")
def written(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with every precision of ort-cuda, not verified."""
    out = tmp_path_factory.mktemp("cuda") / "out"
    specs = [f"ort-cuda:{precision}" for precision in PRECISIONS]
    export(tiny_llama("wide-heads"), specs, out=out, verify=False)
    return out


@pytest.fixture(scope="module")
def reference(written: Path) -> Reference:
    return compute_reference(Checkpoint.open(written / "hf"))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "lacking", lambda: NO_GPU)


def rehearsed(
    out: Path, precision: str, reference: Reference, folder: Path | None = None
) -> Parity:
    name = f"ort-cuda-{precision}"
    checkpoint = Checkpoint.open(out / "hf")
    target, folder = find_target("ort-cuda"), folder or out / name
    return rehearse(target, precision, folder, reference, checkpoint, NO_GPU, artifact=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_holds_the_weights_and_computes_on_the_cpu_yet_is_not_verified(
    precision: str, written: Path, reference: Reference
) -> None:
    parity = rehearsed(written, precision, reference)
    assert parity.problems == ()
    assert not parity.passed
    assert "not verified: it needs a GPU" in str(parity.unverified)
    assert len(parity.phases) == 5
    if precision == "fp32":
        assert parity.max_abs < 1e-4  # sums in another order


def scaled(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.flat[7] = changed.flat[7] * 1.01 + 0.01  # of 12,288 numbers: too little for parity
    return changed


def other_level(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.flat[7] ^= 0x44  # both numbers of one byte, four levels off
    return changed


@pytest.mark.parametrize(
    ("precision", "stored", "change", "names"),
    [
        ("fp16", "model.layers.1.attn.qkv_proj.MatMul.weight", scaled, "layers.1.self_attn.q_proj"),
        ("bf16", "model.layers.2.mlp.down_proj.MatMul.weight", scaled, "layers.2.mlp.down_proj"),
        ("fp32", "model.layers.3.final_norm_layernorm.weight", scaled, "model.norm"),
        (
            "int4",
            "model.layers.0.mlp.up_proj.MatMul.weight_Q4",
            other_level,
            "layers.0.mlp.up_proj",
        ),
    ],
)
def test_one_changed_number_is_found_and_its_tensor_named(
    precision: str,
    stored: str,
    change: Callable[[np.ndarray], np.ndarray],
    names: str,
    written: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    model = ir.load(written / f"ort-cuda-{precision}" / "model.onnx")
    value = model.graph.initializers[stored]
    value.const_value = ir.tensor(change(value.const_value.numpy()), name=stored)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    config = (written / f"ort-cuda-{precision}" / "genai_config.json").read_text("utf-8")
    (tmp_path / "genai_config.json").write_text(config, "utf-8")
    problem, *others = rehearsed(written, precision, reference, tmp_path).problems
    assert problem.startswith(f"model.{names}".replace("model.model", "model"))
    assert "of" in problem
    assert not [other for other in others if "numbers" in other]


def test_swapped_layers_are_found_by_weights_and_by_parity(
    written: Path, reference: Reference, tmp_path: Path
) -> None:
    model = ir.load(written / "ort-cuda-fp16" / "model.onnx")
    one, other = (
        model.graph.initializers[f"model.layers.{n}.mlp.down_proj.MatMul.weight"] for n in (0, 2)
    )
    one.const_value, other.const_value = other.const_value, one.const_value
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    config = (written / "ort-cuda-fp16" / "genai_config.json").read_text("utf-8")
    (tmp_path / "genai_config.json").write_text(config, "utf-8")
    problems = rehearsed(written, "fp16", reference, tmp_path).problems
    assert sum("down_proj" in problem for problem in problems) == 2
    assert any("relative error" in problem for problem in problems)


@pytest.mark.parametrize(
    ("precision", "refused"), [("fp16", True), ("int4", True), ("bf16", False), ("fp32", False)]
)
def test_activations_that_float16_cannot_hold_are_told_although_the_cpu_computes_them(
    precision: str, refused: bool, written: Path, reference: Reference
) -> None:
    assert reference.peak < 100  # of the model as it is
    problems = rehearsed(written, precision, replace(reference, peak=70_000.0)).problems
    assert [("reach 7e+04" in problem) for problem in problems] == [True] * refused


def test_the_peak_of_a_model_is_that_of_its_widest_neurons(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama("wide-heads"), model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"] *= 300
    weights["model.layers.1.mlp.up_proj.weight"] *= 300
    weights["model.layers.1.mlp.down_proj.weight"] /= 90_000
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    # Only their products exceed it: neither the stream nor what either matrix says.
    assert compute_reference(Checkpoint.open(model), rounded=False).peak > 65504


# --- the verbs on a machine without a GPU


def test_export_writes_nothing_that_it_cannot_verify(
    without_gpu: None, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["export", str(tiny_llama("wide-heads")), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--target", "ort-cuda"])
    assert isinstance(done.exception, RuntimeMissingError)
    assert done.exception.exit_code == 6
    assert "--no-verify" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_verify_says_that_it_did_not_and_ends_with_6(without_gpu: None, written: Path) -> None:
    assert manifest.read(written)["artifacts"]["ort-cuda-fp16"]["parity"] is None
    labels = dict(summary.paths(written))
    assert labels["artifact ort-cuda-fp16 NOT VERIFIED"] == written / "ort-cuda-fp16"
    parities = verify(written, ["ort-cuda:fp16", "hf"])
    with pytest.raises(RuntimeMissingError, match="ort-cuda-fp16: rehearsed on the CPU") as caught:
        require(parities)
    assert caught.value.exit_code == 6
    recorded = manifest.read(written)["artifacts"]["ort-cuda-fp16"]["parity"]
    assert recorded["passed"] is False
    assert recorded["problems"] == []
    assert "artifact ort-cuda-fp16 NOT VERIFIED" in dict(summary.paths(written))
    assert "ort-cuda-fp16" in summary.unverified(manifest.read(written))


def test_a_model_card_names_what_nobody_verified(tmp_path: Path) -> None:
    shrink = {"narrow": {"mlp": "obs", "heads": "obs", "refit": True, "local": None, "seed": 0}}
    entry = {"target": "ort-cuda", "precision": "fp16", "bytes": 1, "files": {}, "parity": None}
    manifest.update(
        tmp_path,
        source={"model": "a-model", "licence": None, "bytes": 1},
        shrink=shrink,
        sizes={"parameters": [2, 1]},
        basis={"method": "pca"},
        calibration={"windows": 1, "seqlen": 8, "source": "text"},
        artifacts={"ort-cuda-fp16": entry},
    )
    card.write(tmp_path)
    assert "Not verified: ort-cuda-fp16." in (tmp_path / "README.md").read_text("utf-8")


def test_opening_without_a_gpu_says_what_is_needed(without_gpu: None, written: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="needs a GPU") as caught:
        find_target("ort-cuda").open(written / "ort-cuda-fp16")
    assert caught.value.exit_code == 6


def test_bench_refuses_before_it_exports(without_gpu: None, written: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(written), "--baseline", str(written), "--target", "ort-cuda"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, RuntimeMissingError)
    assert "needs a GPU" in str(done.exception)


def test_the_list_of_targets_tells_writing_from_running(without_gpu: None) -> None:
    [row] = [row for row in list_targets() if row.name == "ort-cuda"]
    assert (row.missing, row.lacking) == ((), tuple(NO_GPU))
    assert json.loads(CliRunner().invoke(app, ["targets", "--json"]).stdout)


# --- fallbacks


def test_a_session_that_fell_back_as_a_whole_is_refused() -> None:
    cuda.check_provider([cuda.CUDA, "CPUExecutionProvider"])
    with pytest.raises(RuntimeMissingError, match="got CPUExecutionProvider: it fell back"):
        cuda.check_provider(["CPUExecutionProvider"])


def test_nodes_that_onnxruntime_really_put_on_the_cpu_are_refused(written: Path) -> None:
    """A session of this onnxruntime, whose own record of placement says CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    file = written / "ort-cuda-fp16" / "model.onnx"
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    placed = cuda.placement(session)
    with pytest.raises(RuntimeMissingError, match="3 GroupQueryAttention on CPUExecutionProvider"):
        cuda.check_placement(placed)
    # The same nodes as CUDA takes them: shapes stay where they are.
    there = [(cuda.CUDA if op in cuda.COMPUTES else where, op) for where, op in placed]
    cuda.check_placement(there)
    left = there.index((cuda.CUDA, "MatMul"))
    there[left] = ("CPUExecutionProvider", "MatMul")
    with pytest.raises(RuntimeMissingError, match="1 MatMul on CPUExecutionProvider"):
        cuda.check_placement(there)


def test_a_record_without_products_and_an_onnxruntime_without_record_are_refused() -> None:
    with pytest.raises(RuntimeMissingError, match="no product"):
        cuda.check_placement([("CPUExecutionProvider", "Shape")])
    with pytest.raises(RuntimeMissingError, match="cannot say on which provider"):
        cuda.placement(SimpleNamespace())


# --- what keeps CUDA away


@pytest.mark.parametrize(
    ("seen", "needs", "advice"),
    [
        (None, "driver", "a machine with a GPU"),
        (cuda.Driver(0, (13, 0)), "shows none", "CUDA_VISIBLE_DEVICES"),
        (cuda.Driver(1, (12, 4)), "serves CUDA up to 12.4", "update the NVIDIA driver"),
        (cuda.Driver(1, (13, 0)), "libcublasLt.so.13", "onnxruntime-gpu[cuda,cudnn]"),
    ],
)
def test_each_reason_is_told_with_its_remedy(
    seen: cuda.Driver | None, needs: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: seen)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.CUDA, "CPU"])
    monkeypatch.setattr(ort, "cuda_version", "13.0")
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("noise"))
    monkeypatch.setattr(cuda, "_load_error", lambda capi: "libcublasLt.so.13: cannot open")
    [reason] = cuda.lacking()
    assert needs in reason
    assert advice in reason


def test_an_onnxruntime_built_without_cuda_beside_a_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: cuda.Driver(1, (13, 0)))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "built without; pip uninstall -y onnxruntime" in cuda.lacking()[0]
    findings = [f for f in doctor.examine().findings if "GPU of this machine" in f.problem]
    assert [finding.mend.partition(" ")[0] for finding in findings] == ["pip"]


def test_the_loader_of_the_system_says_which_library_is_missing(tmp_path: Path) -> None:
    assert cuda._load_error(tmp_path) is None  # nothing to load, nothing to complain of
    (tmp_path / "libonnxruntime_providers_cuda.so").write_bytes(b"not a library")
    assert "libonnxruntime_providers_cuda.so" in str(cuda._load_error(tmp_path))


def test_doctor_lists_cuda_only_where_it_loads(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.CUDA, "CPUExecutionProvider"])
    seen = doctor.examine()
    assert seen.providers["onnxruntime"] == ["CPUExecutionProvider"]
    assert not [finding for finding in seen.findings if "onnxruntime" in finding.problem]


# --- the planner


@pytest.mark.parametrize(("precision", "size"), [("fp16", 2), ("bf16", 2), ("fp32", 4)])
def test_the_plan_says_what_weights_and_cache_take(
    precision: str, size: int, written: Path
) -> None:
    config = Checkpoint.open(written / "hf").config
    where = Deployment(targets=(f"ort-cuda:{precision}",))
    chosen = choose(config, SizeOptions(intermediate_size=88), where)
    planned = chosen.costs.artifacts[f"ort-cuda-{precision}"][0]
    stored = (written / f"ort-cuda-{precision}" / "model.onnx.data").stat().st_size
    rotary = 512 * 32 * size  # the plan counts weights alone, and norms in float32
    assert planned == pytest.approx(stored - rotary, rel=0.01)
    per_token = chosen.costs.cache_per_token[f"ort-cuda-{precision}"][0]
    assert per_token == 2 * 3 * 2 * 32 * size  # keys and values, layers, heads, head_dim


# --- a machine with a GPU


@pytest.mark.skipif(bool(cuda.lacking()), reason=f"ort-cuda needs {'; '.join(cuda.lacking())}")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_and_attention_ran_on_cuda(precision: str, written: Path) -> None:
    session: Any = find_target("ort-cuda").open(written / f"ort-cuda-{precision}")
    assert session.providers == (cuda.CUDA,)
    placed = cuda.placement(session.session)
    assert {where for where, op in placed if op in cuda.COMPUTES} == {cuda.CUDA}
    assert np.isfinite(session.start(np.array([[1, 2, 3]]))).all()
