"""A test on the source of the calibration text is told from one on other text."""

from __future__ import annotations

from pathlib import Path

import pytest

from dotexport.models.text_origins import one_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("wiki/valid.txt", "wiki/test.txt", "code/test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    return tmp_path


def test_one_file_and_files_beside_it_are_one_source(folder: Path) -> None:
    ours, own = f"{folder}/wiki/valid.txt", folder / "out/reports/self.jsonl"
    for judged in (ours, f"{folder}/wiki/test.txt", f"{folder}/wiki"):
        assert "calibration only" in str(one_source(ours, judged, own)), judged
    assert one_source(ours, f"{folder}/code/test.txt", own) is None


def test_a_part_of_a_mix_is_enough(folder: Path) -> None:
    mixed, own = f"self,{folder}/wiki/valid.txt=2", folder / "out/reports/self.jsonl"
    assert one_source(mixed, f"{folder}/wiki/test.txt", own)
    assert one_source(mixed, str(own), own)
    assert one_source(mixed, f"{folder}/code/test.txt", own) is None


def test_data_sets_and_what_ships_inside_are_sources_too(tmp_path: Path) -> None:
    assert one_source("embedded:calibration", "embedded:evaluation", tmp_path)
    assert one_source("wikitext:raw", "wikitext:words", tmp_path)
    assert one_source("wikitext:raw", "c4:en", tmp_path) is None


def test_windows_of_all_of_one_file_are_told(folder: Path) -> None:
    """Where the first were taken, those behind them are others."""
    ours, own = f"{folder}/wiki/valid.txt", folder / "out/reports/self.jsonl"
    assert "one window in 3" in str(one_source(ours, ours, own, every=3))
    assert "one window" not in str(one_source(ours, ours, own))
    assert "one window" not in str(one_source(ours, f"{folder}/wiki/test.txt", own, every=3))
