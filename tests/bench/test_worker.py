"""The measuring process: its protocol, what it times and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dotexport.bench import Workload
from dotexport.bench.process import PATIENCE_S, Worker
from dotexport.bench.worker import harness_overhead_us, is_stable, iterate, serve

Plant = Callable[..., Path]


class Recorder:
    """A session that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Any]]] = []

    def start(self, tokens_BL: np.ndarray, lengths_B: object = None) -> np.ndarray:
        self.asked.append(("start", tokens_BL.tolist()))
        return np.zeros((*tokens_BL.shape, 2), np.float32)

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        self.asked.append(("step", tokens_B.tolist()))
        return np.zeros((*tokens_B.shape, 2), np.float32)


def test_a_request_is_one_prefill_and_a_step_for_each_further_token() -> None:
    workload = Workload(prompt_length=3, generation_length=4, batch_size=2)
    prompt_BL, continuation_NB = workload.tokens(vocabulary=10)
    session = Recorder()
    timing = iterate(session, prompt_BL, continuation_NB)
    assert len(timing) == 4
    assert min(timing) >= 0
    expected = [("start", prompt_BL.tolist())]
    expected += [("step", tokens_B.tolist()) for tokens_B in continuation_NB]
    assert session.asked == expected


def test_ids_are_the_same_for_the_same_seed() -> None:
    workload = Workload(seed=7)
    for once, again in zip(workload.tokens(100), workload.tokens(100), strict=True):
        np.testing.assert_array_equal(once, again)
        assert once.min() >= 0
        assert once.max() < 100


def test_the_harness_costs_less_than_a_tenth_of_a_millisecond() -> None:
    assert 0 < harness_overhead_us(Workload()) < 100


def test_times_are_stable_when_the_last_are_like_those_before() -> None:
    assert is_stable([90, 50, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    assert not is_stable([10] * 9)
    assert not is_stable([20, 20, 20, 20, 20, 10, 10, 10, 10, 10])


def test_what_libraries_print_is_no_answer(plant: Plant, small: Workload) -> None:
    # The planted session prints, and so does a child process of its own.
    with Worker("model", threads=1) as worker:
        loaded = worker.ask(
            "load", target="planted", folder=str(plant("m")), workload=small.as_dict()
        )
        assert loaded["vocabulary"] == 50
        assert loaded["first_run_ms"] >= small.generation_length
        assert worker.ask("warm_up", vocabulary=50)["warmups"] == 2
        samples = worker.ask("measure", iterations=3)["samples_ns"]
        assert [len(sample) for sample in samples] == [3, 3, 3]


def test_requests_and_answers_are_lines_of_json() -> None:
    answers: list[dict[str, Any]] = []
    load = {"do": "load", "target": "no such target", "folder": ".", "workload": {}}
    serve(io.StringIO(json.dumps(load) + "\n" + '{"do": "memory"}\n'), answers.append)
    assert answers[0]["error"] == "UsageError"
    assert "no such target" in answers[0]["message"]
    assert answers[1]["peak_rss_bytes"] >= answers[1]["rss_bytes"]


def test_warming_up_goes_on_until_times_are_stable(plant: Plant) -> None:
    workload = Workload(prompt_length=2, generation_length=2, threads=1, min_warmups=3)
    with Worker("model", threads=1) as worker:
        worker.ask("load", target="planted", folder=str(plant("m")), workload=workload.as_dict())
        warmed = worker.ask("warm_up", vocabulary=50)
    assert warmed["stable"]
    assert warmed["warmups"] >= 10  # five times, and five before them to compare with


def test_an_interrupt_while_measuring_ends_the_worker_at_once(
    plant: Plant, small: Workload
) -> None:
    worker = Worker("model", threads=1)
    process = psutil.Process(worker._process.pid)
    interrupted: list[float] = []

    def interrupt() -> None:
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def measure() -> None:
        with worker:
            worker.ask("load", target="planted", folder=str(plant("m")), workload=small.as_dict())
            worker.ask("warm_up", vocabulary=50)
            threading.Timer(0.5, interrupt).start()
            worker.ask("measure", iterations=10**6)

    with pytest.raises(KeyboardInterrupt):
        measure()
    # Killed, not waited for: PATIENCE_S is how long a worker may take to end by itself.
    assert time.monotonic() - interrupted[0] < PATIENCE_S
    assert not process.is_running()


def test_a_worker_ends_when_its_parent_is_killed(plant: Plant) -> None:
    workload = Workload(prompt_length=2, generation_length=2, threads=1)
    program = (
        "import sys; from dotexport.bench.process import Worker; w = Worker('m');"
        f"w.ask('load', target='planted', folder={str(plant('m'))!r},"
        f" workload={workload.as_dict()!r});"
        "w.ask('warm_up', vocabulary=5); print(w._process.pid, flush=True);"
        "w.ask('measure', iterations=10**6)"
    )
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1)  # the worker is busy by now and does not look at its stdin
        parent.kill()
    # A request takes a few milliseconds, and the worker looks for its parent before each.
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)
