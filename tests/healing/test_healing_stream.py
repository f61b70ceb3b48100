"""Text that is read as steps ask for it: its order, its shares, and what is kept out of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dotexport.errors import CalibrationError, UsageError
from dotexport.healing import healing_stream
from dotexport.healing.heal_options import HealOptions, parse_heal
from dotexport.healing.healing_stream import Batches, Runs, Streamed, pieces
from dotexport.models.text_options import parts_of

NONE_HELD = torch.full((1, 8), -1)


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def numbers(start: int, count: int) -> str:
    return " ".join(str(n) for n in range(start, start + count))


def streamed(sources: dict[str, str], asked: str, held: torch.Tensor = NONE_HELD) -> Streamed:
    def documents(source: str) -> Iterator[str]:
        yield from sources[source].split("|")

    return Streamed(parts_of(asked), documents, encode, 8, held, 3)


def test_every_window_comes_once_before_any_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pools that hold some of them and all of them."""
    sources = {"a": f"{numbers(0, 50)}|{numbers(50, 35)}"}
    for pool in (4, 1024):
        monkeypatch.setattr(healing_stream, "POOL", pool)
        first, second = (list(map(int, part)) for part in _starts(streamed(sources, "a"), 10, 2))
        assert sorted(first) == sorted(second) == list(range(0, 80, 8))
        assert first != sorted(first)
        assert first != second


def _starts(text: Streamed, count: int, times: int) -> Iterator[list[int]]:
    windows = iter(text)
    return ([window[0] for window in islice(windows, count)] for _ in range(times))


def test_sources_have_the_shares_of_their_weights() -> None:
    text = streamed({"a": numbers(0, 80), "b": numbers(1000, 80)}, "a=3,b=1")
    drawn = Counter("b" if window[0] >= 1000 else "a" for window in islice(iter(text), 40))
    assert drawn == {"a": 30, "b": 10}


def test_no_more_is_read_than_a_pool() -> None:
    read: list[int] = []

    def documents(source: str) -> Iterator[str]:
        for start in range(0, 1 << 30, 8):
            read.append(start)
            yield numbers(start, 8)

    text = Streamed(parts_of("a"), documents, encode, 8, NONE_HELD, 0)
    list(islice(iter(text), 20))
    assert len(read) <= healing_stream.POOL + 21


def test_the_original_says_no_more_than_is_needed() -> None:
    said: list[int] = []

    def documents(source: str) -> Iterator[str]:
        for start in range(0, 1 << 30, 8):
            said.append(start)
            yield numbers(start, 8)

    text = Streamed(parts_of("self"), documents, encode, 8, NONE_HELD, 0)
    assert [int(window[0]) for window in islice(iter(text), 20)] == said


def test_held_out_windows_are_left_out_wherever_they_begin() -> None:
    held = torch.arange(19, 27)[None]
    windows = islice(iter(streamed({"a": numbers(3, 80)}, "a", held)), 20)
    # The window 19 .. 26 is among those that are cut from 3 on: 3, 11, 19, ...
    assert {int(window[0]) for window in windows} == {*range(3, 83, 8)} - {19}


def test_a_run_is_found_at_every_place_and_nothing_else() -> None:
    held_NL = np.arange(200).reshape(2, 100)
    runs = Runs(held_NL, 80)
    window_L = np.arange(1000, 1080)
    assert runs.spare(window_L)
    for start in (0, 7, 16):
        shared_L = window_L.copy()
        shared_L[start : start + 64] = held_NL[1, 11:75]
        assert not runs.spare(shared_L)
        shared_L[start] = 5  # a run of 63 is none
        assert runs.spare(shared_L)


def test_steps_read_the_same_windows_whenever_they_are_asked() -> None:
    text = streamed({"a": numbers(0, 400), "b": numbers(1000, 72)}, "a,b")
    whole = Batches(text, 3)
    steps = [whole(step) for step in range(6)]
    resumed = Batches(text, 3)
    assert torch.equal(resumed(4), steps[4])
    assert torch.equal(resumed(5), steps[5])
    assert torch.equal(resumed(1), steps[1])


def test_a_corpus_is_cut_at_ends_of_lines_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(healing_stream, "PIECE", 10)
    document = "one two\nthree\nfour five six seven\neight"
    cut = list(pieces(document))
    assert "".join(cut) == document
    assert cut[:2] == ["one two\n", "three\n"]
    assert max(map(len, cut)) <= 10


def test_text_with_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(CalibrationError, match="a gives not one window of 8 tokens"):
        next(iter(streamed({"a": numbers(0, 7)}, "a")))


def test_heal_text_is_for_distillation_and_stands_alone() -> None:
    assert parse_heal("2k", text="a.txt=3,self") == (
        None,
        HealOptions(tokens=2000, text="a.txt=3,self"),
    )
    with pytest.raises(UsageError, match="--heal-text is what the whole model"):
        parse_heal("local", text="a.txt")
    with pytest.raises(UsageError, match="--heal-samples counts windows"):
        parse_heal("200", text="a.txt", samples=9)
    with pytest.raises(UsageError, match="twice"):
        parse_heal("200", text="a.txt,a.txt")


def test_text_that_is_not_there_is_refused_before_anything_is_narrowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dotexport.app import cli

    command = ["dotexport", "shrink", "embedded", "-o", str(tmp_path / "out"), "--params", "0.7x"]
    text = ["--calib", "embedded:calibration", "--samples", "4", "--seqlen", "32"]
    healed = ["--allocate", "rule", "--heal", "1k", "--heal-text", str(tmp_path / "no.txt")]
    monkeypatch.setattr(sys, "argv", [*command, *text, *healed])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == CalibrationError.exit_code
    assert "no.txt does not exist" in capsys.readouterr().err
