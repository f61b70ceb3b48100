"""The table of `python -m dotexport.bench axes`, on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.bench.tables import axes

Tiny = Callable[..., Path]


def test_ways_to_one_budget_are_judged_before_and_behind_healing_and_a_stopped_run_goes_on(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "out"
    text.write_text("".join(chr(33 + n * n % 87) for n in range(4000)), encoding="utf-8")
    other.write_text("".join(chr(33 + n * 5 % 87) for n in range(4000)), encoding="utf-8")
    model = tiny_model(model_type="llama", num_hidden_layers=4, hidden_size=64)
    asked = ["--model", str(model), "--calib", str(text), "--second", str(other)]
    asked += ["--test", str(text), "--other", str(other), "--params", "0.85x"]
    asked += ["--samples", "8", "--seqlen", "32", "--windows", "2", "--length", "32"]
    asked += ["--only", "MLP alone", "--only", "depth alone", "-o", str(out)]
    shrink, made = axes.shrink, []

    def stops(*args: object) -> object:
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return shrink(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(axes, "shrink", stops)
    CliRunner().invoke(axes.app, asked)
    assert not (out / "axes.md").exists()
    notes = out / ".axes.jsonl"
    noted = notes.read_text(encoding="utf-8").splitlines()
    assert len(noted) == 2  # the original, and one way
    # As if this row were of another text: it is measured again.
    noted[1] = noted[1].replace(f'"second": "{other}"', '"second": "another"')
    notes.write_text("\n".join(noted) + "\n", encoding="utf-8")
    result = CliRunner().invoke(axes.app, [*asked, "--healed", "2"])
    assert result.exit_code == 0, result.output
    assert len(made) == 2 + 2
    rows = json.loads((out / "axes.json").read_text(encoding="utf-8"))["rows"]
    assert [row["way"] for row in rows] == ["the original", "MLP alone", "depth alone"]
    whole, mlp, depth = rows
    assert (whole["KL"], whole["perplexity, healed"]) == (0, "")
    assert mlp["sizes"].endswith("layers 4")
    assert depth["sizes"].startswith("hidden 64, intermediate 88")
    for row in (mlp, depth):
        assert float(row["parameters"][:-1]) <= 0.85
        assert row["KL"] > 0
        assert row["other KL"] != row["KL"]
        # The state before is kept where no step helps, as judged on other windows.
        assert 0 < row["KL, healed"] < 1.5 * row["KL"]
    assert not notes.exists()
    assert "Healed: the same after 2 steps" in (out / "axes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "vocab", "counted"),
    [
        ([], 16384, None),
        (["--vocab-for", "named.txt"], None, "named.txt"),
        (["--vocab", "60"], 60, None),
    ],
)
def test_tokens_leave_by_the_text_that_is_named(
    flags: list[str],
    vocab: int | None,
    counted: str | None,
    tiny_model: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + n * n % 87) for n in range(600)), encoding="utf-8")
    model = tiny_model(model_type="llama", num_hidden_layers=1)
    asked = [
        "--model",
        str(model),
        *(f"--{name}={text}" for name in ("calib", "second", "test", "other")),
    ]
    asked += ["--windows", "1", "--length", "16", "-o", str(tmp_path / "out")]
    made = []

    def stops(model: Path, out: Path, options: ShrinkOptions) -> None:
        made.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(axes, "shrink", stops)
    CliRunner().invoke(axes.app, [*asked, *flags, "--only", "MLP and vocabulary"])
    [options] = made
    assert (options.vocabulary.vocab, options.vocabulary.vocab_for) == (vocab, counted)
    assert options.sizes.axes == "intermediate_size"
