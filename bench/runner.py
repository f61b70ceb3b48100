"""Running both models in turns: their processes, the device's own rates, and who is asked when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from statistics import median
from typing import Any

from dotexport.errors import RuntimeMissingError
from dotexport.exports.target import Target

from .counts import Cost, find_cost
from .device import one_cpu_per_core
from .energy import Meter, find_meter
from .process import Worker
from .result import Measurement, Sample
from .roofline import Rates
from .subject import Subject
from .workload import Workload

LATER_ROUNDS = 4  # of the first warm-up's patience: compilers and caches on disk are warm by then
ON_DEVICE = "peak_device_bytes"

Probe = Callable[[], list[dict[str, Any]]]
Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many percent of the measuring are; never while timing."""


@dataclass(frozen=True)
class Setting:
    """What both models run on.

    Attributes:
        runtime: options of the target's `open`, beyond threads.
        roofline: whether to measure the device as well.
        planted_slowdown: of the candidate: a fault for the bench to find.
    """

    target: Target
    precision: str
    runtime: Mapping[str, Any] = field(default_factory=dict)
    roofline: bool = True
    planted_slowdown: float = 0.0


def measure(
    subjects: tuple[Subject, Subject], setting: Setting, workload: Workload, progress: Progress
) -> tuple[Measurement, Measurement, Rates | None]:
    """Rounds of fresh processes, each loaded, warmed up, and asked in turns, until it is enough.

    Where a process's memory happens to lie makes it faster or slower for as long as it lives, so
    more requests to one pair of processes do not tell more about the models; further pairs do.
    """
    first, second = (Runner(one, setting, workload) for one in subjects)
    with ExitStack() as stack:
        moments: list[dict[str, Any]] = []
        probe: Probe = list
        iterations = 0
        for number in count():
            with ExitStack() as alive:
                pair = (first, second) if number % 2 == 0 else (second, first)
                for runner in pair:
                    progress(f"loading the {runner.subject.name}", *_progress(first, second))
                    runner.load(alive)
                _check_same_providers(first, second)
                if number == 0:
                    probe = stack.enter_context(_probing(first, second, progress))
                    moments += probe()
                vocabulary = min(first.loaded["vocabulary"], second.loaded["vocabulary"])
                for runner in pair:
                    progress(f"warming up the {runner.subject.name}", *_progress(first, second))
                    runner.warm_up(vocabulary)
                iterations = iterations or _block_size(first, second)
                _take_turns(first, second, number, iterations, progress)
                for runner in pair:
                    runner.remember_memory()
            if share_done(first, second) >= 1:
                break
        moments += probe()
    progress("measured", 100, 100)
    rates = Rates.of(first.device, moments) if moments else None
    return first.measurement(), second.measurement(), rates


@dataclass
class Runner:
    """One model, its processes one round after another, and what came out of them so far."""

    subject: Subject
    setting: Setting
    workload: Workload
    workers: list[Worker] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    warmed: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    joules: float = 0.0

    def load(self, alive: ExitStack) -> None:
        """Fresh processes, which end with `alive`."""
        label = f"{self.subject.name} {self.subject.source}"
        self.workers = [
            alive.enter_context(Worker(label, threads=self.workload.threads_each))
            for _ in range(self.workload.concurrency)
        ]
        self.answers += ask_all(
            self.workers,
            "load",
            target=self.setting.target.name,
            folder=str(self.subject.artifact),
            workload=self.workload.as_dict(),
            runtime=dict(self.setting.runtime),
            slow_by=self.setting.planted_slowdown if self.subject.name == "candidate" else 0.0,
        )

    @property
    def loaded(self) -> dict[str, Any]:
        """What the newest process said of the model; all say the same, but for times."""
        return self.answers[-1]

    @cached_property
    def cost(self) -> Cost | None:
        """Of the model as it was loaded; None where its family or its device is not known."""
        config = self.subject.config
        if config is None or self.loaded["offloads"]:
            return None
        number = self.loaded["number"]
        return find_cost(config, self.setting.target, self.setting.precision, number)

    @property
    def device(self) -> str:
        return "cuda" if "cuda" in " ".join(self.loaded["providers"]).lower() else "cpu"

    @cached_property
    def meter(self) -> tuple[Meter | None, str]:
        return find_meter(self.device)

    def warm_up(self, vocabulary: int) -> None:
        patience = self.workload.max_warmup_seconds / (LATER_ROUNDS if self.warmed else 1)
        self.warmed += ask_all(self.workers, "warm_up", vocabulary=vocabulary, patience=patience)

    def run(self, number: int, group: int, iterations: int) -> None:
        """One block: every process so many requests, one after another."""
        meter, _ = self.meter
        before = meter.joules() if meter else 0.0
        answers = ask_all(
            self.workers, "measure", iterations=iterations, cpus=self._processors(group)
        )
        self.joules += meter.joules() - before if meter else 0.0
        for answer in answers:
            for first, *gaps in answer["samples_ns"]:
                itl_ms = tuple(gap / 1e6 for gap in gaps)
                self.samples.append(Sample(group, first / 1e6, itl_ms, number))

    def remember_memory(self) -> None:
        """Of this round's processes, together."""
        found = ask_all(self.workers, "memory")
        self.memory.append(
            {name: sum(one[name] or 0 for one in found) for name in ("peak_rss_bytes", ON_DEVICE)}
        )

    def _processors(self, group: int) -> list[int] | None:
        """Where both models run in this group; None: wherever the system puts them.

        Left alone, two processes with fewer threads than there are cores settle on different ones,
        and the busier core is blamed on the model. The next group takes the next cores.
        """
        cpus, threads = one_cpu_per_core(), self.workload.threads or 0
        if self.device == "cuda" or not 0 < threads < len(cpus):
            return None
        return [cpus[(group * threads + n) % len(cpus)] for n in range(threads)]

    @property
    def seconds(self) -> float:
        """That this model was measured."""
        return sum(sample.e2el_ms for sample in self.samples) / 1e3 / self.workload.concurrency

    @property
    def iteration_s(self) -> float:
        return float(min(warmed["iteration_s"] for warmed in self.warmed))

    def measurement(self) -> Measurement:
        return Measurement(
            name=self.subject.name,
            source=str(self.subject.source),
            artifact=str(self.subject.artifact),
            artifact_bytes=self.subject.num_bytes,
            num_parameters=self.subject.num_parameters,
            vocabulary=self.loaded["vocabulary"],
            import_s=self._median("import_s"),
            load_s=self._median("load_s"),
            first_run_ms=self._median("first_run_ms"),
            warmups=min(warmed["warmups"] for warmed in self.warmed),
            warmed_up=all(warmed["stable"] for warmed in self.warmed),
            harness_overhead_us=self.loaded["harness_overhead_us"],
            rss_before_load_bytes=(
                self.loaded["rss_before_load_bytes"] * self.workload.concurrency
            ),
            peak_rss_bytes=max(one["peak_rss_bytes"] for one in self.memory),
            providers=tuple(self.loaded["providers"]),
            samples=tuple(self.samples),
            peak_device_bytes=max(one[ON_DEVICE] for one in self.memory) or None,
            answered_positions=self.loaded["answered_positions"],
            energy=self._energy(),
            cost=self.cost,
        )

    def _median(self, name: str) -> float:
        """Over all processes."""
        return float(median(answer[name] for answer in self.answers))

    def _energy(self) -> dict[str, Any]:
        meter, reason = self.meter
        if meter is None:
            return {"source": None, "reason": reason, "joules": None, "joules_per_token": None}
        requests = len(self.samples) * self.workload.batch_size
        tokens = requests * self.workload.generation_length
        return {
            "source": meter.source,
            "reason": None,
            "joules": self.joules,
            "joules_per_token": self.joules / tokens,
        }


def ask_all(workers: list[Worker], do: str, **arguments: object) -> list[dict[str, Any]]:
    """The same of all at the same time."""
    for worker in workers:
        worker.send(do, **arguments)
    return [worker.receive(do) for worker in workers]


def _check_same_providers(first: Runner, second: Runner) -> None:
    ours, theirs = first.loaded["providers"], second.loaded["providers"]
    if ours != theirs:
        raise RuntimeMissingError(
            f"the candidate runs on {ours} and the baseline on {theirs}; expected the same: one "
            "of them fell back, so the comparison would mean nothing"
        )


@contextmanager
def _probing(first: Runner, second: Runner, progress: Progress) -> Iterator[Probe]:
    """Measure the device in a process of its own, whenever called; [] where nothing asks for it."""
    setting, workload = first.setting, first.workload
    costs = [runner.cost for runner in (first, second) if runner.cost is not None]
    if not setting.roofline or len(costs) < 2:
        yield list
        return
    sizes = [round(cost.decode(workload).num_bytes) * workload.concurrency for cost in costs]
    numbers = sorted({"fp32", *(cost.number for cost in costs)})
    with Worker("the device", threads=workload.threads) as worker:

        def probe() -> list[dict[str, Any]]:
            progress("measuring the device", *_progress(first, second))
            return [worker.ask("probe", device=first.device, sizes=sizes, numbers=numbers)]

        yield probe


def _take_turns(
    first: Runner, second: Runner, number: int, iterations: int, progress: Progress
) -> None:
    """A B B A, then B A A B: the groups of one round.

    In each group both models have the same mean position in time; starting each second group
    with the other model makes neither always the one that follows a pause.
    """
    groups = first.workload.groups_each_round
    for group in range(number * groups, (number + 1) * groups):
        progress("measuring", *_progress(first, second))
        outer, inner = (first, second) if group % 2 == 0 else (second, first)
        for runner in (outer, inner, inner, outer):
            runner.run(number, group, iterations)


def _block_size(first: Runner, second: Runner) -> int:
    """Iterations in a block, so that the rounds asked for are about enough: two in each group."""
    asked = first.workload
    iteration_s = max(min(first.iteration_s, second.iteration_s), 1e-9)
    needed = max(asked.min_iterations / asked.concurrency, asked.min_seconds / iteration_s)
    return max(1, math.ceil(needed / (2 * asked.rounds * asked.groups_each_round)))


def share_done(first: Runner, second: Runner) -> float:
    """Of what the workload asks for; 1 is enough."""
    asked = first.workload
    shares = [
        len({sample.group for sample in second.samples}) / (asked.rounds * asked.groups_each_round)
    ]
    for runner in (first, second):
        shares.append(len(runner.samples) / asked.min_iterations)
        if asked.min_seconds > 0:
            shares.append(runner.seconds / asked.min_seconds)
    return min(shares)


def _progress(first: Runner, second: Runner) -> tuple[int, int]:
    return min(99, int(100 * share_done(first, second))), 100
