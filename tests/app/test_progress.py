"""How far long work is, where no terminal shows bars."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dotexport.app.progress import Lines
from dotexport.embedded import MODEL_DIR


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_says_every_half_minute_how_long_it_still_takes() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines(said.append, clock)
    for done in range(11):
        lines("narrowing", done, 10)
        clock.now += 20
    lines("measuring bases: pca", 0, 2)
    clock.now += 0.5
    lines("measuring bases: dot", 1, 2)
    lines.finish()
    assert said == [
        "narrowing",
        # After two steps of 20 s, eight of them are left: seconds up to a hundred, then minutes.
        "narrowing: 2 of 10, 40 s, 2.7 min left",
        "narrowing: 4 of 10, 80 s, 2 min left",
        "narrowing: 6 of 10, 2 min, 80 s left",
        "narrowing: 8 of 10, 2.7 min, 40 s left",
        "narrowing: 10 of 10, 3.3 min, 0 s left",
        "narrowing: done in 3.7 min",
        "measuring bases: pca",
    ]


def test_time_left_of_a_run_that_goes_on_is_counted_from_where_it_does() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines(said.append, clock)
    for done in range(60, 63):
        lines("healing: held-out KL 0.5", done, 100)
        clock.now += 40
    assert said[1:] == [
        "healing: held-out KL 0.5: 61 of 100, 40 s, 26 min left",
        "healing: held-out KL 0.5: 62 of 100, 80 s, 25 min left",
    ]


def test_a_plain_stream_gets_lines_and_stdout_stays_clean(tmp_path: Path) -> None:
    shrink = [sys.executable, "-m", "dotexport", "shrink", str(MODEL_DIR), "--heal", "none"]
    command = [*shrink, "-o", str(tmp_path / "out"), "--calib", "embedded:calibration"]
    sizes = ["--intermediate", "448", "--samples", "4", "--seqlen", "32"]
    ended = subprocess.run([*command, *sizes, "--json"], capture_output=True, text=True, check=True)
    lines = ended.stderr.splitlines()
    assert "narrowing" in lines
    assert not any("━" in line or "\x1b" in line or "\r" in line for line in lines)
    assert len(ended.stdout.splitlines()) == 1
