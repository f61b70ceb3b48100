"""Text becomes windows of token ids: in order, disjoint, and never padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dotexport.errors import CalibrationError, UsageError
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import documents, token_windows, window_length


@pytest.fixture
def model(tiny_llama: Callable[[str], Path]) -> Path:
    """Its token 3 + n is the word wn; context 512."""
    return tiny_llama("wide-heads")


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def windows(model: Path, file: Path, **options: int) -> list[list[int]]:
    found: list[list[int]] = token_windows(model, TextOptions(source=str(file), **options)).tolist()
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twenty words of which number 10 to 19 stand in the second document."""
    file = tmp_path / "text.txt"
    file.write_text(f"{words(*range(10))}<|endoftext|>\n{words(*range(10, 20))}")
    return file


def test_documents_are_joined_and_cut_without_overlap(model: Path, text: Path) -> None:
    assert windows(model, text, seqlen=8) == [
        [3, 4, 5, 6, 7, 8, 9, 10],
        [11, 12, 13, 14, 15, 16, 17, 18],
    ]


def test_windows_are_int64_as_embeddings_want_them(model: Path, text: Path) -> None:
    assert token_windows(model, TextOptions(source=str(text), seqlen=5)).dtype == torch.int64


def test_skipping_and_sampling_give_disjoint_parts(model: Path, text: Path) -> None:
    everything = windows(model, text, seqlen=4)
    first = windows(model, text, seqlen=4, samples=2)
    rest = windows(model, text, seqlen=4, samples=9, skip=2)
    assert first + rest == everything
    assert len(first) == 2


def test_fewer_windows_than_asked_for_are_fine(model: Path, text: Path) -> None:
    assert len(windows(model, text, seqlen=10, samples=100)) == 2


def test_skipping_everything_is_refused(model: Path, text: Path) -> None:
    with pytest.raises(CalibrationError, match="after 2 skipped ones; give more text"):
        windows(model, text, seqlen=10, skip=2)


def test_windows_are_as_long_as_the_context_unless_asked(model: Path) -> None:
    assert window_length(model, TextOptions(source="x")) == 512
    assert window_length(model, TextOptions(source="x", seqlen=512)) == 512
    with pytest.raises(UsageError, match="context of 512 tokens; give at most that"):
        window_length(model, TextOptions(source="x", seqlen=513))


def test_each_document_keeps_its_start_token(model: Path, text: Path, tmp_path: Path) -> None:
    """A tokenizer that puts <s> (1) in front does so once per document."""
    from tokenizers import Tokenizer, processors

    beginning = tmp_path / "beginning"
    beginning.mkdir()
    for file in model.glob("*.json"):
        (beginning / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(beginning / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(beginning / "tokenizer.json"))
    assert windows(beginning, text, seqlen=11) == [[1, *range(3, 13)], [1, *range(13, 23)]]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.txt").write_text(f"{mark}one<|endoftext|> \n<|endoftext|>two\n", "utf-8")
    assert list(documents(str(tmp_path / "a.txt"))) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text(f'{mark}{{"text": "one"}}\r\n\n{{"text": "two"}}\n', "utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["one", "two"]


def test_json_lines_may_hold_line_ends_that_only_unicode_knows(tmp_path: Path) -> None:
    rows = ["one\u2028two\x85three\x1cfour", "five"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"))) == rows


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "a/b.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(str(tmp_path))) == ["a/b.txt", "a/c.txt", "b.txt"]


def test_reading_ends_with_the_last_window_asked_for(model: Path, tmp_path: Path) -> None:
    good, bad = json.dumps({"text": words(*range(8))}), "not JSON"
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}")
    assert len(windows(model, tmp_path / "a.jsonl", seqlen=4, samples=2)) == 2
    with pytest.raises(CalibrationError, match="line 2 is not JSON"):
        windows(model, tmp_path / "a.jsonl", seqlen=4, samples=3)


def test_calibration_and_evaluation_that_ship_inside_are_disjoint() -> None:
    calibration = set(documents("embedded:calibration"))
    evaluation = set(documents("embedded:evaluation"))
    assert calibration
    assert evaluation
    assert not calibration & evaluation
