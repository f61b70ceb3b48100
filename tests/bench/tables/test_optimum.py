"""The comparison with optimum-onnx: one small run of the real command, and its refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dotexport.bench.tables import optimum
from dotexport.errors import DotexportError, UsageError

app = typer.Typer()
app.command()(optimum.main)
TINY = [
    "--layers",
    "1",
    "--vocab",
    "1024",
    "--groups",
    "2",
    "--rounds",
    "1",
    "--prompt",
    "4",
    "--generate",
    "4",
]


@pytest.mark.heavy
@pytest.mark.optimum
def test_both_graphs_of_one_model_are_timed_in_turns(tmp_path: Path) -> None:
    if "DOTEXPORT_OPTIMUM_PYTHON" not in os.environ:
        pytest.skip(
            "set DOTEXPORT_OPTIMUM_PYTHON to the Python of an environment with optimum-onnx"
        )
    python = os.environ["DOTEXPORT_OPTIMUM_PYTHON"]
    done = CliRunner().invoke(
        app, ["--optimum-python", python, "-o", str(tmp_path), "--threads", "1", *TINY]
    )
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "optimum.json").read_text("utf-8"))
    rates = {row["graph"]: row["decode tok/s"] for row in written["rows"] if "graph" in row}
    assert set(rates) == {"ort-cpu", "optimum-onnx", "optimum-onnx generate", "narrowed"}
    assert min(rates.values()) > 0
    ratios = [row for row in written["rows"] if "over" in row]
    assert all(row["from"] <= row["ratio"] <= row["to"] for row in ratios)
    [narrowed] = [r for r in ratios if (r["decode rate"], r["over"]) == ("narrowed", "ort-cpu")]
    assert 1.2 < narrowed["bytes, inverse ratio"] < 1.7  # 0.7x, and a tokenizer and graph beside


def test_a_python_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--optimum-python", str(tmp_path / "none")])
    assert isinstance(done.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_what_the_other_python_says_last_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named optimum >&2\nexit 3\n", "utf-8")
    python.chmod(0o755)
    with pytest.raises(DotexportError, match="code 3:\nno module named optimum"):
        optimum._elsewhere(python, "")
