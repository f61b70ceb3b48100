"""`python -m dotexport.bench` and the table it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dotexport.app.cli import main
from dotexport.bench import BenchResult
from dotexport.bench.result import METRICS
from dotexport.bench.table import busy, conditions, rows, verdicts

Plant = Callable[..., Path]
Measured = tuple[BenchResult, dict[str, Any], list[tuple[str, int, int]]]
SHORT = [
    "--prompt",
    "4",
    "--generate",
    "2",
    "--threads",
    "1",
    "--min-iterations",
    "4",
    "--min-seconds",
    "0",
    "--warmups",
    "0",
    "--rounds",
    "1",
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command with these arguments and give its exit code."""
    monkeypatch.setattr(sys, "argv", ["dotexport", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_table_for_people_then_one_line_for_programs(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (plant("a"), "--baseline", plant("b"), "--target", "planted", *SHORT)
    assert call(monkeypatch, *arguments) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any("TTFT p50" in line for line in table)
    assert "samples" not in json.loads(last)["candidate"]


def test_json_is_all_of_stdout(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (plant("a"), "--noise-check", "--target", "planted", "--json", *SHORT)
    assert call(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    result = BenchResult.from_dict(json.loads(captured.out))
    assert result.workload.min_iterations == 4
    assert "TTFT p50" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("nowhere --noise-check --target planted", 2, "nowhere is no folder"),
        ("nowhere --noise-check --target nothing", 2, "no target is called 'nothing'"),
        ("nowhere --target planted", 2, "either --baseline MODEL, or --noise-check"),
        ("nowhere --noise-check --baseline b", 2, "either --baseline MODEL, or --noise-check"),
        ("nowhere --noise-check --batch 0", 2, "batch_size is 0"),
        ("nowhere --no-such-flag", 2, "No such option"),
    ],
)
def test_a_wrong_request_is_one_message_and_an_exit_code(
    arguments: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *arguments.split()) == code
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert "Example:" in said
    assert "A B B A" in said


def test_a_busy_machine_is_told(measured: Measured) -> None:
    result = measured[0]
    for load, doubted in ((0.1, False), (2.0, True)):
        machine = result.environment | {"load_average": [load] * 3}
        said = "\n".join(busy(replace(result, environment=machine)))
        assert ("other work" in said) == doubted


def test_the_report_says_what_it_depends_on(measured: Measured) -> None:
    result = measured[0]
    labels = [row[0] for row in rows(result)]
    assert {"TTFT p50, ms", "ITL p99, ms", "decode, tokens/s", "peak memory, MB"} <= set(labels)
    noise, *others = [line.split(":")[0] for line in verdicts(result)]
    assert noise in ("PASS", "FAIL")  # a model against itself
    assert others == ["end to end", "prefill", "decode"]
    said = "\n".join(conditions(result))
    assert all(meaning in said for meaning in METRICS.values())
    assert "prompt 4, generated 3, batch 1, 1 threads" in said
    assert "the candidate was not stable after 2 warm-up requests" in said
