"""Whole benches of planted models, whose speed is nothing but waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dotexport.bench import BenchResult, Workload, bench, noise_check
from dotexport.errors import DotexportError, RuntimeMissingError, UsageError

Plant = Callable[..., Path]
Measured = tuple[BenchResult, dict[str, Any], list[tuple[str, int, int]]]


def children() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


@pytest.mark.parametrize(
    ("wait_ms", "word"), [(16.0, "faster"), (20.0, "no measurable gain"), (24.0, "slower")]
)
def test_a_planted_difference_is_found(
    plant: Plant, small: Workload, wait_ms: float, word: str
) -> None:
    candidate = plant("candidate", start_ms=wait_ms, step_ms=wait_ms)
    baseline = plant("baseline", start_ms=20, step_ms=20)
    result = bench(candidate, baseline, "planted", workload=replace(small, min_iterations=20))
    assert word in result.verdict
    # Waits end late by far less than 5 %; a planted 20 % is not mistaken for another figure.
    assert result.comparisons["tpot"].ratio == pytest.approx(wait_ms / 20, rel=0.05)


def test_prefill_and_decode_are_told_apart(plant: Plant, small: Workload) -> None:
    candidate = plant("candidate", start_ms=5, step_ms=10)
    baseline = plant("baseline", start_ms=10, step_ms=5)
    result = bench(candidate, baseline, "planted", workload=small)
    assert "faster" in result.comparisons["ttft"].verdict
    assert "slower" in result.comparisons["tpot"].verdict
    rates = result.candidate.throughput(small)
    # Four tokens in 5 ms, one in 10 ms; waits end late, never early.
    assert 500 < rates["prefill_tok_s"] <= 800
    assert 50 < rates["decode_tok_s"] <= 100


def test_every_request_is_kept_and_models_take_turns(plant: Plant, small: Workload) -> None:
    result = noise_check(plant("model"), "planted", workload=replace(small, min_iterations=5))
    for model in (result.candidate, result.baseline):
        assert len(model.samples) >= 5
        assert all(len(sample.itl_ms) == small.generation_length - 1 for sample in model.samples)
    assert result.candidate.by_group("e2el").shape == result.baseline.by_group("e2el").shape


def test_measuring_lasts_as_long_as_asked(plant: Plant, small: Workload) -> None:
    asked = replace(small, min_iterations=2, min_seconds=0.2)
    result = noise_check(plant("model"), "planted", workload=asked)
    for model in (result.candidate, result.baseline):
        assert sum(model.values("e2el")) >= 200


def test_ids_stay_below_the_smaller_vocabulary(plant: Plant, small: Workload) -> None:
    # The planted session refuses ids that its vocabulary does not have.
    result = bench(plant("candidate", vocabulary=3), plant("baseline"), "planted", workload=small)
    assert (result.candidate.vocabulary, result.baseline.vocabulary) == (3, 50)


def test_a_report_survives_json(measured: Measured) -> None:
    result, stored, _ = measured
    assert BenchResult.from_dict(stored) == result
    assert BenchResult.from_dict(stored).as_dict() == result.as_dict()


def test_a_report_has_the_field_names_of_vllm(measured: Measured) -> None:
    figures = measured[1]["candidate"]
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99"):
            assert figures[f"{statistic}_{metric}_ms"] >= 0
    assert figures["request_throughput"] > 0
    assert figures["output_throughput"] > 0


def test_a_report_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="not a bench report"):
        BenchResult.from_dict({"schema": "something else"})


def test_memory_and_machine_are_recorded(measured: Measured) -> None:
    result = measured[0]
    assert 0 < result.candidate.rss_before_load_bytes <= result.candidate.peak_rss_bytes
    assert result.candidate.providers == ("Patience",)
    assert result.environment["threads"] == 1
    assert {"cpu", "cores", "libraries", "governor", "load_average"} <= set(result.environment)


def test_the_peak_of_a_large_parent_is_not_that_of_its_worker(
    plant: Plant, small: Workload
) -> None:
    ballast = bytearray(os.urandom(1)) * 700_000_000
    result = noise_check(plant("model"), "planted", workload=small)
    assert result.candidate.peak_rss_bytes < len(ballast)


@pytest.mark.parametrize("crash_at", [1, 2, 4])
def test_a_crash_names_the_model_and_its_last_words(
    plant: Plant, small: Workload, crash_at: int
) -> None:
    candidate = plant("broken", crash_at=crash_at)
    with pytest.raises(DotexportError, match=r"(?s)candidate .*broken.*the roof fell in"):
        bench(candidate, plant("baseline"), "planted", workload=small)
    assert children() == []


def test_an_error_in_the_worker_keeps_its_kind(plant: Plant, small: Workload) -> None:
    with pytest.raises(RuntimeMissingError, match=r"baseline .*patience is not installed"):
        bench(plant("candidate"), plant("baseline", missing=True), "planted", workload=small)


def test_answers_that_are_no_numbers_are_refused(plant: Plant, small: Workload) -> None:
    with pytest.raises(DotexportError, match="NaN"):
        noise_check(plant("model", nan=True), "planted", workload=small)


def test_a_provider_that_fell_back_fails_the_run(plant: Plant, small: Workload) -> None:
    with pytest.raises(RuntimeMissingError, match="fell back"):
        bench(plant("a", provider="CUDA"), plant("b", provider="CPU"), "planted", workload=small)


def test_an_interrupt_leaves_no_process_behind(plant: Plant, small: Workload) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "measuring":
            assert len(children()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        noise_check(plant("model"), "planted", workload=small, progress=interrupt)
    assert children() == []


def test_progress_only_grows_until_it_is_whole(measured: Measured) -> None:
    stages, done, total = zip(*measured[2], strict=True)
    assert {"loading the candidate", "warming up the baseline", "measuring"} <= set(stages)
    assert list(done) == sorted(done)
    assert done[-1] == 100
    assert set(total) == {100}


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt_length", 0), ("generation_length", 1), ("threads", 0), ("min_seconds", -1)],
)
def test_an_impossible_workload_is_refused(field: str, value: int) -> None:
    with pytest.raises(UsageError, match=field):
        Workload(**{field: value})
