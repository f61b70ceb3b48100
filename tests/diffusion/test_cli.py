"""One command line for both kinds of models: what is given decides which verb answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.diffusion.pipeline_options import parse_extra
from dotexport.errors import DotexportError, SizeError, UsageError
from dotexport.storage import manifest

Tiny = Callable[[str], Path]
run = CliRunner().invoke


@pytest.fixture
def classes(prompts: Path) -> Path:
    prompts.write_text("1\n3\n7\n", encoding="utf-8")
    return prompts


def test_a_pipeline_is_shrunk_evaluated_and_benched_by_the_same_verbs(
    tiny: Tiny, classes: Path, tmp_path: Path
) -> None:
    source, out = str(tiny("dit")), str(tmp_path / "out")
    asked = ["--steps", "2", "--guidance", "1"]
    # fmt: off
    made = run(app, ["shrink", source, "-o", out, "--ffn", "0.5x", "--calib", str(classes),
                     "--json", *asked])
    assert made.exit_code == 0, made.output
    shrunk = json.loads(made.stdout.splitlines()[-1])
    assert shrunk["parameters"][1] < shrunk["parameters"][0]
    made = run(app, ["eval", out, "--baseline", source, "--text", str(classes), "--features",
                     "latents", "--repeats", "1", "--json", *asked])
    assert made.exit_code == 0, made.output
    quality = json.loads(made.stdout.splitlines()[-1])
    assert quality["deviation"] > 0
    assert quality["frechet"] > 0
    made = run(app, ["bench", out, "--baseline", source, "--target", "torch", "--groups", "2",
                     "--seconds", "0", "--steps", "1", "--json"])
    # fmt: on
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout.splitlines()[-1])["step"]["groups"] >= 2
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "held-out denoising loss" in card
    assert "torch step" in card
    assert (tmp_path / "out" / "reports" / "grid.png").is_file()
    assert set(manifest.read(tmp_path / "out")) >= {"source", "shrink", "quality", "bench"}


def test_bench_times_step_and_pipeline_in_onnx_runtime(
    tiny: Tiny, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Through the command line, for people and for programs; few turns give no verdict."""
    out, few = tmp_path / "out", ["--threads", "1", "--groups", "2", "--seconds", "0"]
    shutil.copytree(exported("dit"), out)
    asked = ["bench", str(out), "--baseline", str(tiny("dit")), "--steps", "2", *few]
    made = run(app, [*asked, "--json"])
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["target"] == "onnx"
    assert record["threads"] == 1
    assert record["bytes"][1] < record["bytes"][0]
    for what in ("step", "whole"):
        assert 0 < record[what]["low"] <= record[what]["ratio"] <= record[what]["high"]
        assert "no verdict" in record[what]["verdict"]
        dense, pruned = record[what]["samples_ms"]
        assert len(dense) == len(pruned) == record[what]["groups"] >= 2
    # Two steps of the pipeline hold two of the denoiser.
    assert record["whole"]["baseline_ms"] > record["step"]["baseline_ms"]
    # The table has what earlier runs found, too; torch needs no graphs of the original.
    shown = run(app, [*asked, "--target", "torch"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for words in (
        "onnx step, 1 thread",
        "onnx whole, 1 thread",
        "torch step, 1 thread",
        "no verdict",
    ):
        assert words in shown.output
    assert isinstance(run(app, [*asked, "--groups", "1"]).exception, UsageError)


def test_help_is_that_of_what_is_given(tiny: Tiny) -> None:
    assert "diffusers pipeline folder" in run(app, ["shrink", "--help"]).output
    shown = run(app, ["shrink", str(tiny("dit")), "--help"], env={"COLUMNS": "200"}).output
    assert "--timestep-weights" in shown
    replaced = ["shrink", "a-model", "-o", str(tiny("dit")), "--help"]
    assert "--timestep-weights" not in run(app, replaced, env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["--params", "1x"], UsageError, "everything"),
        (["--params", "0.5x", "--heads", "0.5x"], UsageError, "one way"),
        ([], UsageError, "how much to keep"),
        (["--params", "0.001x"], SizeError, "cannot be met"),
        (["--params", "0.5x", "--method", "magic"], UsageError, "magic"),
        (["--params", "0.5x", "--timestep-weights", "late"], UsageError, "late"),
        (["--params", "0.5x", "--pipeline-arg", "x"], UsageError, "NAME=VALUE"),
        (["--sparsity", "2:3"], UsageError, "2:4"),
        (["--params", "0.5x", "--layout", "x.json"], UsageError, "one way"),
        (["--layout", "missing.json"], UsageError, "does not exist"),
    ],
)
def test_bad_requests_are_named_and_leave_nothing(
    arguments: list[str],
    error: type[DotexportError],
    match: str,
    tiny: Tiny,
    classes: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    given = ["shrink", str(tiny("dit")), "-o", str(out), "--calib", str(classes), *arguments]
    made = run(app, [*given, "--steps", "1"])
    assert isinstance(made.exception, error)
    assert match in str(made.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_nothing_to_verify_is_said(tiny: Tiny, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # fmt: off
    made = run(app, ["shrink", str(tiny("dit")), "-o", str(out), "--ffn", "0.5x", "--allocation",
                     "uniform", "--calib", str(classes), "--steps", "1"])
    # fmt: on
    assert made.exit_code == 0, made.output
    assert isinstance(run(app, ["verify", str(out)]).exception, UsageError)
    again = run(app, ["shrink", str(tiny("dit")), "-o", str(out), "--calib", "x", "--ffn", "0.5x"])
    assert isinstance(again.exception, UsageError)
    assert "--overwrite" in str(again.exception)


def test_values_of_pipeline_arguments_are_json_or_text() -> None:
    assert parse_extra(["a=1", "b=[1, 2]", "c=blurry"]) == {"a": 1, "b": [1, 2], "c": "blurry"}
