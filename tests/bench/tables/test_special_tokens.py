"""The table of special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dotexport.bench.tables.special_tokens import app
from dotexport.embedded import MODEL_DIR


def test_a_token_that_is_another_is_told_where_it_stands_and_behind(tmp_path: Path) -> None:
    """One row of the table moved: nothing before it, something at it and behind it."""
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] *= 3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    asked = ["--model", str(MODEL_DIR), "--text", "embedded:evaluation", "--windows", "2"]
    flags = ["--length", "64", "-o", str(tmp_path)]
    done = CliRunner().invoke(app, [str(MODEL_DIR), str(other), *asked, *flags])
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "special-tokens.json").read_text())["rows"]
    assert row["token"] == "<|endoftext|>"
    same = [row[f"dotexport-embedded, {place}"] for place in ("before", "at", "behind")]
    assert same == pytest.approx([0, 0, 0], abs=1e-9)
    # The head is tied, so that one logit of many moves in front of it, too.
    before, at, behind = (row[f"other, {place}"] for place in ("before", "at", "behind"))
    assert before < 0.2 * min(at, behind)
