"""The measuring process: loads one artifact in a fresh interpreter and times it on request.

    python -m dotexport.bench.worker

reads one JSON object per line from stdin and answers each with one line on stdout:

    {"do": "load", "target": ..., "folder": ..., "workload": {...}}  -> load and first-run times;
                     "runtime": {...} goes to the target's `open`
    {"do": "warm_up", "vocabulary": V}                               -> how many, and if stable
    {"do": "measure", "iterations": K}                               -> K raw samples
    {"do": "memory"}                                                 -> resident bytes, and peak
    {"do": "probe", "device": ..., "sizes": [...], "numbers": [...]} -> rates of the device

It ends when stdin does. A request that cannot be met is answered {"error": ..., "message": ...};
any other failure ends the process, with its traceback on stderr.

Shapes: B sequences of a batch, L prompt tokens, N generated tokens after the first, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, perf_counter_ns, thread_time
from typing import Any, TextIO

import numpy as np
import psutil

from dotexport.errors import DotexportError
from dotexport.exports.target import Logits, Session, Target, Tokens, find_target

from .device import ask_nvidia
from .workload import Workload

STABLE_WINDOW = 5
STABLE_WITHIN = 0.05
OVERHEAD_RUNS = 20

Timing = list[int]
"""Nanoseconds of one iteration: to the first token, then from each token to the next."""


def iterate(session: Session, prompt_BL: Tokens, continuation_NB: Tokens) -> Timing:
    """One request: a prefill, then one decode step for each further token.

    The ids are fixed, so both models do the same work and no sampling is timed.
    """
    marks = [perf_counter_ns()]
    # Kept until the end, so that giving back a large array falls into no interval.
    prefill_BLV = session.start(prompt_BL)
    marks.append(perf_counter_ns())
    for tokens_B in continuation_NB:
        session.step(tokens_B)
        marks.append(perf_counter_ns())
    del prefill_BLV
    return [after - before for before, after in pairwise(marks)]


class Nothing:
    """A session that computes nothing: what it costs is the harness itself."""

    def start(self, tokens_BL: Tokens, lengths_B: object = None) -> Logits:
        return np.zeros((1, 1, 1), np.float32)

    def step(self, tokens_B: Tokens) -> Logits:
        return np.zeros((1, 1), np.float32)


class Slowed:
    """A session that computes longer by a known share, busy as a slower kernel would be.

    By the share of this thread's processor time, not of the clock's: on a busy machine most of that
    is waiting, and working for a share of it would be a far larger slowdown.
    """

    def __init__(self, session: Session, share: float) -> None:
        self.session = session
        self.share = share
        self.providers = getattr(session, "providers", ())

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        started = thread_time()
        answer = self.session.start(tokens_BL, lengths_B)
        return self._later(started, answer)

    def step(self, tokens_B: Tokens) -> Logits:
        started = thread_time()
        answer = self.session.step(tokens_B)
        return self._later(started, answer)

    def _later(self, started: float, answer: Logits) -> Logits:
        end = started + (thread_time() - started) * (1 + self.share)
        while thread_time() < end:
            pass
        return answer


def harness_overhead_us(workload: Workload) -> float:
    """Microseconds of each interval that belong to the harness: the clock and the loop."""
    prompt_BL, continuation_NB = workload.tokens(1)
    runs = [iterate(Nothing(), prompt_BL, continuation_NB) for _ in range(OVERHEAD_RUNS)]
    return median(gap for run in runs for gap in run) / 1e3


class Bench:
    """The state of one worker: a session and what it is fed."""

    session: Session
    workload: Workload
    prompt_BL: Tokens
    continuation_NB: Tokens
    answered_positions: int
    patience: float

    def load(
        self,
        target: str,
        folder: str,
        workload: dict[str, Any],
        runtime: dict[str, Any] | None = None,
        slow_by: float = 0.0,
    ) -> dict[str, Any]:
        """Open the artifact and run it once, the two timed apart."""
        self.workload = Workload(**workload)
        before = _resident()
        start = perf_counter()
        adapter = find_target(target)
        imported = perf_counter()
        self.session = adapter.open(
            Path(folder),
            threads=self.workload.threads_each,
            **(runtime or {}),
            **self._own_options(adapter),
        )
        if slow_by:
            self.session = Slowed(self.session, slow_by)
        loaded = perf_counter()
        vocabulary, first_run_ms = self._first_run()
        return {
            "import_s": imported - start,
            "load_s": loaded - imported,
            "first_run_ms": first_run_ms,
            "vocabulary": vocabulary,
            "answered_positions": self.answered_positions,
            "number": getattr(self.session, "number", None),
            "offloads": getattr(self.session, "offloads", False),
            "rss_before_load_bytes": before,
            "providers": [str(p) for p in getattr(self.session, "providers", ())],
            "harness_overhead_us": harness_overhead_us(self.workload),
        }

    def _own_options(self, adapter: Target) -> dict[str, Any]:
        """What a runtime is told because it is measured, if it takes such options."""
        asked = self.workload
        own = {"lean": True, "capacity": asked.prompt_length + asked.generation_length}
        return {name: own[name] for name in own if name in getattr(adapter, "run_options", ())}

    def _first_run(self) -> tuple[int, float]:
        # The vocabulary is not known yet; id 0 is in every one.
        prompt_BL, continuation_NB = self.workload.tokens(1)
        start = perf_counter()
        prefill_BLV = self.session.start(prompt_BL)
        for tokens_B in continuation_NB:
            last_BV = self.session.step(tokens_B)
        first_run_ms = (perf_counter() - start) * 1e3
        self.answered_positions = int(prefill_BLV.shape[1])
        _check(_on_host(prefill_BLV[:, -1]), _on_host(last_BV), expected=prompt_BL.shape[0])
        return int(last_BV.shape[-1]), first_run_ms

    def warm_up(self, vocabulary: int, patience: float | None = None) -> dict[str, Any]:
        """Iterate until times are stable, and give an idea of how long one takes.

        Args:
            patience: seconds after which to stop anyhow; None: the workload's.
        """
        self.patience = self.workload.max_warmup_seconds if patience is None else patience
        self.prompt_BL, self.continuation_NB = self.workload.tokens(vocabulary)
        start = perf_counter()
        times: list[int] = []
        while not self._warm(times, perf_counter() - start):
            times.append(sum(self._iterate()))
        return {
            "warmups": len(times),
            "stable": is_stable(times),
            "iteration_s": median(times[-STABLE_WINDOW:]) / 1e9,
        }

    def _warm(self, times: list[int], elapsed: float) -> bool:
        if len(times) < 2:
            return False
        if elapsed >= self.patience:
            return True
        return len(times) >= self.workload.min_warmups and is_stable(times)

    def measure(self, iterations: int, cpus: list[int] | None = None) -> dict[str, Any]:
        """Raw samples. One request that is not kept wakes threads and refills caches first."""
        if cpus:
            stay_on(cpus)
        self.session.start(self.prompt_BL)
        self.session.step(self.continuation_NB[0])
        return {"samples_ns": [self._iterate() for _ in range(iterations)]}

    def _iterate(self) -> Timing:
        if os.getppid() != _parent:
            raise SystemExit("the process that asked for this is gone")
        with _no_collection():
            return iterate(self.session, self.prompt_BL, self.continuation_NB)

    def memory(self) -> dict[str, Any]:
        return {
            "rss_bytes": _resident(),
            "peak_rss_bytes": peak_resident(),
            "peak_device_bytes": self._device_bytes(),
        }

    def _device_bytes(self) -> int | None:
        """Most that the runtime held on a GPU if it says so, else what the driver says it holds."""
        session = getattr(self, "session", None)
        providers = " ".join(map(str, getattr(session, "providers", ())))
        if "cuda" not in providers.lower():
            return None
        peak: int | None = getattr(session, "peak_device_bytes", None)
        return held_on_gpu() if peak is None else peak

    def probe(self, device: str, sizes: list[int], numbers: list[str]) -> dict[str, Any]:
        """What the device can do; in a worker that holds no model."""
        from .probe import measure  # torch comes with it

        return measure(device, None, sizes, numbers)


def stay_on(cpus: list[int]) -> None:
    """Bind every thread of this process to these processors, where the system can."""
    tasks = Path("/proc/self/task")
    if hasattr(os, "sched_setaffinity") and tasks.is_dir():
        for task in tasks.iterdir():
            with suppress(ProcessLookupError):  # a thread may end meanwhile
                os.sched_setaffinity(int(task.name), cpus)


def is_stable(times: list[int]) -> bool:
    """Whether the last few times are as long as the few before them, in the median."""
    if len(times) < 2 * STABLE_WINDOW:
        return False
    recent = median(times[-STABLE_WINDOW:])
    earlier = median(times[-2 * STABLE_WINDOW : -STABLE_WINDOW])
    return abs(recent - earlier) <= STABLE_WITHIN * earlier


def _on_host(logits: Any) -> Logits:
    """An array of what may be a tensor on a device."""
    array: Logits = logits.float().cpu().numpy() if hasattr(logits, "cpu") else logits
    return array


def _check(first_BV: Logits, last_BV: Logits, *, expected: int) -> None:
    """Fast and wrong is not fast: refuse a model whose answers are no answers."""
    if first_BV.shape != last_BV.shape or first_BV.shape[0] != expected:
        raise DotexportError(
            f"prefill answers {first_BV.shape} and decode {last_BV.shape} for a batch of "
            f"{expected}; expected (batch, vocabulary) from both: run `dotexport verify` first"
        )
    if not (np.isfinite(first_BV).all() and np.isfinite(last_BV).all()):
        raise DotexportError(
            "the model answers NaN or infinite logits; run `dotexport verify` to see where"
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Most bytes this process ever held in memory: interpreter, libraries, weights, cache.

    Not from getrusage on Linux: its figure survives exec, so a child of a large process would
    start with the peak of its parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_on_gpu() -> int | None:
    """Bytes that the driver says this process holds now; None where it does not say."""
    for line in ask_nvidia("--query-compute-apps=pid,used_memory"):
        pid, _, mebibytes = line.partition(", ")
        if pid == str(os.getpid()) and mebibytes.isdigit():
            return int(mebibytes) << 20
    return None


def serve(requests: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Meet requests, one line each, until there are no more."""
    bench = Bench()
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "load": bench.load,
        "warm_up": bench.warm_up,
        "measure": bench.measure,
        "memory": bench.memory,
        "probe": bench.probe,
    }
    for line in requests:
        request = json.loads(line)
        verb = verbs[request.pop("do")]
        try:
            answer(verb(**request))
        except DotexportError as error:
            answer({"error": type(error).__name__, "message": str(error)})
        if verb == bench.load:
            gc.freeze()  # what is loaded stays: no collection has to walk it


def _private_stdout() -> TextIO:
    """The real stdout, for answers alone: what libraries print goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    # Ctrl-C reaches the whole process group; whoever asked for the measurement ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _private_stdout()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    serve(sys.stdin, answer)


_parent = os.getppid()

if __name__ == "__main__":
    main()
