"""A history only grows, survives what kills its writer, and is drawn device by device."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from dotexport.bench import history
from dotexport.bench.gate import parse_gate
from dotexport.bench.report.trend import write_trend
from dotexport.bench.verdicts import judge
from dotexport.errors import UsageError

Write = Callable[..., Path]


@pytest.fixture
def file(write: Write, tmp_path: Path) -> Path:
    """Three entries: two of one device, one of another."""
    kept = tmp_path / "deep" / "history.jsonl"
    for number, cpu in enumerate(("Test CPU", "Test CPU", "Other CPU")):
        report = write(f"{number}.json", seed=number, machine={"cpu": cpu})
        history.append_history(kept, judge([report]).comparisons)
    return kept


def test_what_was_appended_is_read_back(file: Path, write: Write) -> None:
    entries = history.read(file)
    assert len(entries) == 3
    found = judge([write("again.json", seed=1)]).comparisons[0]
    assert entries[1].ratios["decode_tok_s"] == found.ratio("decode_tok_s")
    assert entries[1].figures["peak_rss_bytes"] == 80_000_000
    assert entries[0].device == entries[1].device != entries[2].device


@pytest.mark.parametrize("cut", [1, 100, -1], ids=["first byte", "within", "all but line end"])
def test_a_killed_writer_costs_its_own_line_at_most(
    file: Path, write: Write, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole[: -len(last)] + last[:cut])
    history.append_history(file, judge([write("next.json", seed=7)]).comparisons)
    entries = history.read(file)
    # A line that lacks nothing but its end is whole.
    assert len(entries) == (4 if cut == -1 else 3)
    assert len(caplog.records) == (0 if cut == -1 else 1)
    assert all("line 3 is left out" in record.getMessage() for record in caplog.records)


def test_writers_at_the_same_time_keep_each_others_lines(write: Write, tmp_path: Path) -> None:
    found, kept = judge([write()]).comparisons, tmp_path / "h.jsonl"
    with ThreadPool(8) as pool:
        pool.map(lambda _: history.append_history(kept, found), range(24))
    assert len(history.read(kept)) == 24


def test_the_commit_is_that_of_the_repository(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, kept = judge([write()]).comparisons, tmp_path / "h.jsonl"
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    history.append_history(kept, found)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *command], check=True)
    history.append_history(kept, found)
    commits = [entry.commit for entry in history.read(kept)]
    assert commits[0] is None
    assert len(str(commits[1])) == 40


def test_devices_are_drawn_apart_with_the_limits_of_the_gate(file: Path, tmp_path: Path) -> None:
    limits = parse_gate({"decode_tok_s": ">=1.15x", "peak_rss": "<=90MB"}, "g")
    write_trend(file, tmp_path / "t.html", limits=limits)
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 4
    assert page.count("The gate asks for &gt;=1.15x.") >= 2
    assert "on Test CPU" in page
    assert "on Other CPU" in page
    write_trend(file, tmp_path / "t.csv", metrics=["decode_tok_s", "tpot_p99"])
    rows = list(csv.DictReader((tmp_path / "t.csv").open(encoding="utf-8")))
    assert len(rows) == 6
    ratio = [float(row["value"]) for row in rows if row["figure"].startswith("decode")]
    assert ratio == pytest.approx([1 / 0.8] * 3, rel=0.03)


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_trend_is_a_picture_too(file: Path, tmp_path: Path, kind: str, start: bytes) -> None:
    write_trend(file, tmp_path / f"t.{kind}")
    assert (tmp_path / f"t.{kind}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("content", "out", "asked", "message"),
    [
        (None, "t.html", {}, "cannot be read"),
        ("", "t.html", {}, "holds no history"),
        ('{"schema": "x"}\n[]\n1\n', "t.html", {}, "holds no history"),
        ("whole", "t.pdf", {}, r"ends in \.pdf; expected \.html, \.png"),
        ("whole", "t.html", {"metrics": ["spead"]}, "no entry of the history has spead; known"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    file: Path, tmp_path: Path, content: str | None, out: str, asked: Any, message: str
) -> None:
    if content is None:
        file.unlink()
    elif content != "whole":
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        write_trend(file, tmp_path / out, **asked)


def test_every_line_is_json_by_itself(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["schema"] == history.SCHEMA
