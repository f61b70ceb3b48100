"""Workloads: presets, sweeps, several processes at once, rounds; and noise checks in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dotexport.app.benching import bench_name, workload_of
from dotexport.app.cli import main
from dotexport.app.steps import BenchStep
from dotexport.bench import BenchResult, Sweep, Workload, bench, noise_check, sweep, worker
from dotexport.bench.presets import PRESETS, find_preset
from dotexport.bench.sweeps import parse_values, steps_of
from dotexport.bench.table import SWEEP_COLUMNS, sweep_row
from dotexport.bench.worker import Slowed
from dotexport.errors import UsageError

Plant = Callable[..., Path]
Measured = tuple[BenchResult, dict[str, Any], list[tuple[str, int, int]]]
SHORT = "--generate 2 --threads 1 --min-iterations 2 --min-seconds 0 --warmups 0 --rounds 1"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dotexport", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_workload_and_flags_override_it(name: str) -> None:
    asked = workload_of(BenchStep(preset=name, generate=7))
    expected = find_preset(name) | {"generation_length": 7}
    assert {field: getattr(asked, field) for field in expected} == expected


def test_without_preset_and_flags_the_workload_is_the_default() -> None:
    assert workload_of(BenchStep()) == Workload()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no preset is called 'poetry'.*chat, rag"):
        workload_of(BenchStep(preset="poetry"))


def test_a_bench_in_another_precision_of_torch_has_a_name_of_its_own() -> None:
    assert bench_name(BenchStep(target="ort-cpu", precision="int4")) == "ort-cpu-int4"
    step = BenchStep(target="hf", dtype="bf16", device="cuda:1", compiled=True)
    assert bench_name(step) == "hf-cuda1-bf16-compiled"


def test_options_of_a_runtime_are_in_the_name_and_a_folder_is_not() -> None:
    step = BenchStep(target="gguf", precision="int8", llama_cpp="/opt/llama.cpp/build")
    assert bench_name(step) == "gguf-int8-llama.cpp"


def test_a_gate_that_cannot_be_read_is_refused_before_a_sweep(
    plant: Plant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, gate = plant("one", step_ms=1), tmp_path / "gate.yaml"
    gate.write_text("decode_toks: [")
    flags = ("--target", "planted", "--batch", "1,2", "--gate", gate, "-o", tmp_path / "r.json")
    assert call(monkeypatch, one, "--baseline", plant("other"), *flags, *SHORT.split()) == 2
    assert "gate.yaml" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_sweep_is_every_combination() -> None:
    steps = steps_of(BenchStep(), {"batch": "1,4", "prompt": "8,16,32", "threads": None})
    assert [(one.batch, one.prompt) for one in steps] == [
        (batch, prompt) for batch in (1, 4) for prompt in (8, 16, 32)
    ]


@pytest.mark.parametrize("text", ["", "1,", "two", "1;2"])
def test_values_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--batch .* expected a whole number"):
        parse_values("--batch", text)


def test_several_runs_belong_to_a_noise_check() -> None:
    assert len(steps_of(BenchStep(), {}, runs=3, noise=True)) == 3
    with pytest.raises(UsageError, match="--noise-check"):
        steps_of(BenchStep(), {}, runs=3)


def test_a_sweep_is_one_document(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plant("reports") / "sweep.json"
    arguments = [plant("a"), "--baseline", plant("b"), "--target", "planted", "--batch", "1,3"]
    assert call(monkeypatch, *arguments, "--prompt", 2, "-o", file, *SHORT.split()) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert "samples" not in json.loads(last)["results"][0]["candidate"]
    stored = json.loads(file.read_text(encoding="utf-8"))
    read = Sweep.from_dict(stored)
    assert [result.workload.batch_size for result in read.results] == [1, 3]
    assert json.loads(json.dumps(read.as_dict())) == stored
    assert all(len(sweep_row(result)) == len(SWEEP_COLUMNS) for result in read.results)
    assert any("by workload" in line for line in table)


def test_a_document_of_another_kind_is_no_sweep() -> None:
    with pytest.raises(UsageError, match="not a sweep"):
        Sweep.from_dict({"schema": "dotexport.bench/1"})


def test_noise_checks_pass_when_nine_of_ten_hold(measured: Measured) -> None:
    result = measured[0]
    broken = replace(
        result,
        candidate=replace(
            result.candidate,
            samples=tuple(
                replace(one, ttft_ms=9 * one.ttft_ms, itl_ms=tuple(9 * v for v in one.itl_ms))
                for one in result.candidate.samples
            ),
        ),
    )
    assert (broken.noise_verdict or "").startswith("FAIL")
    held = replace(result, candidate=result.baseline, baseline=result.baseline)
    assert (held.noise_verdict or "").startswith("PASS")
    assert (Sweep((held,) * 9 + (broken,)).noise_verdict or "").startswith("PASS")
    assert "in 8 of 10 runs" in (Sweep((held,) * 8 + (broken,) * 2).noise_verdict or "")
    assert (Sweep((held,) * 8 + (broken,) * 2).noise_verdict or "").startswith("FAIL")


def test_two_models_are_no_noise_check(measured: Measured) -> None:
    result = measured[0]
    other = replace(result, candidate=replace(result.candidate, artifact="another"))
    assert other.noise_verdict is None
    assert Sweep((other,)).noise_verdict is None


def test_processes_at_once_answer_as_many_requests_in_the_same_time(
    plant: Plant, small: Workload
) -> None:
    asked = replace(small, threads=2, concurrency=2, min_iterations=4)
    result = noise_check(plant("model", step_ms=5), "planted", workload=asked)
    one = result.candidate
    busy_s = sum(one.values("e2el")) / 1e3
    assert one.throughput(asked)["request_throughput"] == pytest.approx(
        2 * len(one.samples) / busy_s
    )
    # Two interpreters: their memory is counted together.
    assert one.peak_rss_bytes > 2 * one.rss_before_load_bytes / 2.5
    assert one.by_group("e2el").shape == result.baseline.by_group("e2el").shape


def test_more_processes_than_threads_are_refused() -> None:
    with pytest.raises(UsageError, match="threads is 1; expected at least 2"):
        Workload(threads=1, concurrency=2)


def test_every_round_has_processes_of_its_own(plant: Plant, small: Workload) -> None:
    asked = replace(small, rounds=2, min_iterations=2)
    result = noise_check(plant("model"), "planted", workload=asked)
    rounds = {sample.round for sample in result.candidate.samples}
    assert rounds == {0, 1}
    assert result.comparisons["e2el"].rounds == 2
    by_round = [
        {sample.group for sample in result.candidate.samples if sample.round == number}
        for number in rounds
    ]
    assert not by_round[0] & by_round[1]


def test_an_option_that_a_target_lacks_is_refused(plant: Plant, small: Workload) -> None:
    with pytest.raises(UsageError, match="target planted has no dtype"):
        bench(plant("a"), plant("b"), "planted", workload=small, runtime={"dtype": "bf16"})


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_planted_slowdown_is_of_computing(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of processor time that only goes on when somebody computes, or looks at it."""
    spent_s = 0.0

    def clock() -> float:
        nonlocal spent_s
        spent_s += 1e-3
        return spent_s

    class Busy:
        providers = ("here",)

        def start(self, tokens_BL: Any, lengths_B: Any = None) -> Any:
            nonlocal spent_s
            spent_s += 10
            return "logits"

        step = start

    monkeypatch.setattr(worker, "thread_time", clock)
    slow: Any = Slowed(Busy(), share)  # type: ignore[arg-type]
    for ask in (slow.start, slow.step):
        before_s = spent_s
        assert ask(None) == "logits"
        assert spent_s - before_s == pytest.approx(10 * (1 + share), abs=0.01)
    assert slow.providers == ("here",)


def test_a_sweep_in_python_needs_no_command_line(plant: Plant, small: Workload) -> None:
    shapes = [replace(small, batch_size=size, min_iterations=2) for size in (1, 2)]
    found = sweep(plant("a"), None, "planted", workloads=shapes)
    assert [result.workload.batch_size for result in found.results] == [1, 2]
    assert found.noise_verdict is not None
