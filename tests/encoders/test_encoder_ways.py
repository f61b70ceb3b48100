"""The table of `python -m dotexport.bench encoders`, on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dotexport.bench.tables import encoder_ways
from dotexport.bench.tables.encoder_ways import WAYS

Made = Callable[[Path, str], Path]


def test_every_way_is_narrowed_to_the_budget_and_judged(
    sentence_transformer: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sentence_transformer
    asked = ["--model", str(model), "--calib", text, "--test", text, "--other", text]
    asked += ["--samples", "32", "--judged", "16", "--heal", "2", "-o", str(tmp_path)]
    asked += ["--params", "0.9x", "--params", "0.3x"]
    shrink, finished = encoder_ways.shrink, []

    def stops(*args: object) -> object:
        if len(finished) == 2 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        made = shrink(*args)  # type: ignore[arg-type]
        finished.append(args)
        return made

    monkeypatch.setattr(encoder_ways, "shrink", stops)
    CliRunner().invoke(encoder_ways.app, asked)
    assert not (tmp_path / "encoders.md").exists()
    notes = tmp_path / ".encoders.jsonl"
    noted = notes.read_text(encoding="utf-8")
    assert noted.count("\n") == 2
    # Of other sentences, and so no row of this table.
    notes.write_text(
        noted.replace('"cosine": ', '"cosine": 9').replace('"samples": "32"', '"samples": "31"')
        + noted,
        encoding="utf-8",
    )
    result = CliRunner().invoke(encoder_ways.app, asked)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "encoders.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["budget"], row["way"]) for row in rows] == [
        (budget, way) for budget in ("0.9x", "0.3x") for way in WAYS
    ]
    met = [row for row in rows if row["parameters"]]
    assert {row["way"] for row in met} == set(WAYS)
    for row in met:
        assert float(row["parameters"][:-1]) <= float(row["budget"][:-1])
        assert 0 < row["cosine"] <= 1.0001
        assert row["other cosine"] == row["cosine"]
    first = {row["way"]: row for row in rows[: len(WAYS)]}
    assert first["MLP, obs"]["cosine"] > first["MLP, select"]["cosine"]
    assert first["MLP"]["sizes"].startswith("intermediate_size")
    assert first["layers"]["sizes"] == "num_hidden_layers 2"
    assert first["stream"]["sizes"] == "hidden_size 18"
    assert rows[len(WAYS)]["sizes"].endswith("tokens cannot leave of 224")
    assert len(finished) == len(met)  # what was noted was not narrowed again
    assert not (tmp_path / ".encoders.jsonl").exists()
    table = (tmp_path / "encoders.md").read_text(encoding="utf-8")
    words = " ".join(table.split())
    assert "calibrated on 32 sentences; embeddings beside the original's on 16" in words


def test_a_stream_that_stays_is_no_way(made: Made, text: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "modernbert")
    asked = ["--model", str(model), "--calib", text, "--test", text, "--other", text]
    asked += ["--samples", "32", "--judged", "16", "-o", str(tmp_path), "--params", "0.9x"]
    ways = ["--only", "stream", "--only", "MLP, layers and stream"]
    result = CliRunner().invoke(encoder_ways.app, [*asked, *ways])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "encoders.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["sizes"].startswith("it stays")
    assert not rows[0]["parameters"]
    assert rows[1]["parameters"]


def test_a_way_that_is_not_known_is_refused(text: str, tmp_path: Path) -> None:
    asked = ["--model", str(tmp_path), "--calib", text, "--test", text, "--other", text]
    result = CliRunner().invoke(encoder_ways.app, [*asked, "--only", "width"])
    assert result.exit_code == 2
    assert "width is none of tokens" in " ".join(result.output.replace("│", " ").split())
