"""The table of `python -m dotexport.bench heads`, on a small model and words that decide."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dotexport.bench.tables import task_heads

Made = Callable[[Path, str], Path]


def test_a_head_is_trained_narrowed_and_asked(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_heads, "RATE", 2e-3)  # weights that say nothing have far to go
    dice = random.Random(0)
    lines = []
    for number in range(400):  # the first word says how it was rated
        good = number % 2
        words = [f"w{10 + good}", *(f"w{dice.randrange(12, 50)}" for _ in range(6))]
        lines.append(f"{number}\t{[-2.5, 1.5][good]}\t{' '.join(words)}")
    lines.append("400\t0.1\tw10 w11 neither")
    reviews = tmp_path / "reviews.tsv"
    reviews.write_text("\n".join(lines), encoding="utf-8")
    text = tmp_path / "text.txt"
    paragraphs = []
    for number in range(40):
        words = [f"w{dice.randrange(50)}" for _ in range(52)]
        words[20] = str(1000 + number)
        paragraphs.append(f"{' '.join(words)}.")
    text.write_text("\n".join(paragraphs), encoding="utf-8")
    asked = ["--model", str(made(tmp_path / "model", "bert")), "--reviews", str(reviews)]
    asked += ["--text", str(text), "--params", "0.95x", "--only", "MLP and layers"]
    asked += ["--held", "20", "--epochs", "8", "--heal", "2", "-o", str(tmp_path)]
    result = CliRunner().invoke(task_heads.app, asked)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "heads.json").read_text(encoding="utf-8"))["rows"]
    assert [row["task"] for row in rows] == ["reviews", "questions"]
    assert rows[0]["accuracy, before"] > 0.9  # it has learnt the word
    assert rows[0]["accuracy"] > 0.5
    assert {"exact_match, before", "f1"} <= set(rows[1])
    assert "trained for 8 epochs on 380 reviews and 20 questions" in (
        tmp_path / "heads.md"
    ).read_text(encoding="utf-8")


def test_a_question_is_its_sentence_without_its_answer() -> None:
    paragraph = "The river runs to Lake Geneva in 3 days. It was bridged in 1871 by one Ada Stone."
    for seed in range(20):
        row = task_heads._cloze(paragraph, random.Random(seed))
        assert row is not None
        [answer], [start] = row["answers"]["text"], row["answers"]["answer_start"]
        assert paragraph[start : start + len(answer)] == answer
        assert answer in ("Lake Geneva", "3", "1871", "Ada Stone")
        assert answer not in row["question"].split()
        assert "what" in row["question"].split()
    assert task_heads._cloze("Nothing here has a name or figure.", random.Random(0)) is None
