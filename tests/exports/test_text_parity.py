"""Text parity: a folder agrees with itself, and every way of reading text otherwise is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dotexport import embedded
from dotexport.exports.exporting import export
from dotexport.exports.nasty_texts import CONVERSATIONS, TEXTS
from dotexport.exports.text_parity import (
    TextSide,
    check_text,
    hold,
    read_folder,
    stops_of,
)
from dotexport.exports.verifying import verify
from dotexport.models.checkpoint import Checkpoint

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model with a chat template."""
    folder = Path(shutil.copytree(embedded.MODEL_DIR, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def side(model: Path) -> TextSide:
    found = read_folder(model)
    assert found is not None
    return found


def test_about_two_hundred_different_texts_are_asked() -> None:
    assert 180 <= len(TEXTS) == len(set(TEXTS)) <= 220
    assert "" in TEXTS
    for text in TEXTS:
        text.encode()  # no lone surrogates, which no file could hold


def test_a_folder_agrees_with_itself(side: TextSide) -> None:
    verdict = hold(side, side, special=["<|endoftext|>"])
    assert verdict.problems == ()
    assert verdict.num_conversations == len(CONVERSATIONS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"encode": lambda text: s.encode(text.replace("\t", " "))}, "tokens of"),
        (lambda s: {"encode": lambda text: [*s.encode(text), 0]}, "tokens of"),
        (lambda s: {"render": lambda _: None}, "conversation 1 becomes None"),
        (lambda s: {"render": lambda c: (s.render(c) or "") + "\n"}, "chat template"),
        (lambda s: {"start": 7}, "start token: 7"),
        (lambda s: {"stops": frozenset()}, "stop tokens: 0 of transformers' 0 missing"),
        (lambda s: {"stops": frozenset({0, 9})}, "stop tokens: 9 beside"),
    ],
)
def test_what_reads_otherwise_is_named(
    change: Callable[[TextSide], dict[str, Any]], said: str, side: TextSide
) -> None:
    problems = hold(replace(side, **change(side)), side).problems
    assert problems
    assert said in problems[0]


def test_stops_of_the_runtime_itself_are_no_fault(side: TextSide) -> None:
    other = replace(side, stops=side.stops | {9}, own_stops=frozenset({9}))
    assert hold(other, side).problems == ()


def test_what_no_artifact_could_hold_is_told(
    side: TextSide, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(
        side,
        encode=lambda text: side.encode(text.replace("\t", " ")),
        excuse=lambda text: "tabs are spaces there" if "\t" in text else None,
    )
    verdict = hold(other, side)
    # Not where it would meet every user: in a conversation.
    assert verdict.problems == (
        "chat template: tokens of conversation 3 differ: tabs are spaces there",
    )
    assert "tabs are spaces there" in verdict.excused[0]
    assert "tabs are spaces there" in caplog.text


def test_generation_config_says_where_to_stop_and_then_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert stops_of(tmp_path) == [3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3, -1]}))
    assert stops_of(tmp_path) == [5, 3]


def test_a_stock_checkpoint_that_lost_its_template_is_found(model: Path, tmp_path: Path) -> None:
    target: Any = object()  # one without a reader of its own
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / "chat_template.jinja").unlink()
    verdict = check_text(target, folder, Checkpoint.open(model))
    assert verdict is not None
    assert "chat template: conversation 1 becomes None" in verdict.problems[0]


def test_a_merge_that_no_text_needs_and_an_end_that_nobody_reads_are_held_too(
    model: Path, tmp_path: Path
) -> None:
    target: Any = SimpleNamespace(text=lambda _, folder: read_folder(folder, stops=[0]))
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    verdict = check_text(target, folder, Checkpoint.open(model))
    assert verdict is not None
    assert verdict.problems == (
        "text: merges of its tokenizer.json are not the checkpoint's",
        "stop tokens: generation_config.json beside it says 7, and transformers has 0",
    )


def test_a_tokenizer_that_cannot_be_read_is_a_problem(model: Path, tmp_path: Path) -> None:
    target: Any = object()
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / "tokenizer.json").write_text("{")
    verdict = check_text(target, folder, Checkpoint.open(model))
    assert verdict is not None
    assert "its tokenizer cannot be read" in verdict.problems[0]


def test_a_model_without_a_tokenizer_has_no_text_side(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    target: Any = object()
    assert check_text(target, model, Checkpoint.open(model)) is None


def test_export_and_verify_hold_text_and_report_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    [artifact] = export(model, ["hf"], out=out)
    assert artifact.parity is not None
    assert artifact.parity.text is not None
    assert artifact.parity.text["conversations"] == 3
    verify(out)
    report = json.loads((out / "reports" / "verify.json").read_text())
    assert report["artifacts"]["hf"]["text"]["problems"] == []
