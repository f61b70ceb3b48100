"""vLLM's own benchmarks, run for two models in turns and compared.

    vllm bench latency      one batch again and again, in a process of its own for each turn
    vllm bench throughput   many requests at once, likewise
    vllm bench serve        a server for each model stays up; clients come one turn after another,
                            by Poisson arrivals (a request rate) or in a closed loop (concurrency)

Nothing of vLLM is imported here: its benchmarks are started on the Python that has it, and what
they write is read. The figures are vLLM's, clock and definitions too.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dotexport.errors import DotexportError, UsageError
from dotexport.storage.reading import read_json

from ..statistics import ENOUGH_GROUPS, Comparison, Summary, compare, summarize

SCHEMA = "dotexport.served/1"
KINDS = ("latency", "throughput", "serve")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Serving is cheap to repeat, for the servers stay up; every other turn loads a model.
ROUNDS = {"latency": 2, "throughput": 2, "serve": ENOUGH_GROUPS}
SLACK = 16  # tokens that a random prompt may gain when it is made text and read again

Times = Mapping[str, Sequence[float]]
"""Metric -> milliseconds of each request (latency: of each batch; throughput: of all together)."""


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """What vLLM's benchmark is asked for.

    Attributes:
        kind: one of KINDS.
        prompt, generate: tokens of every request; its end-of-text is ignored.
        batch: sequences of a batch (latency).
        iterations: batches of each turn (latency).
        requests: of each turn (throughput, serve).
        warmups: batches or requests before each turn.
        rounds: A B B A turns; None: as many as ROUNDS says.
        request_rate: Poisson arrivals for each second (serve); None: all at once.
        concurrency: requests under way at most (serve).
        precision: fp32, bf16 or fp16; None: as stored.
        threads: CPU threads of vLLM; None: its own choice.
        arguments: more flags for vLLM's engine.
        seed: of prompts and arrivals.
    """

    kind: str = "latency"
    prompt: int = 128
    generate: int = 64
    batch: int = 1
    iterations: int = 15
    requests: int = 32
    warmups: int = 10
    rounds: int | None = None
    request_rate: float | None = None
    concurrency: int | None = None
    precision: str | None = None
    threads: int | None = None
    arguments: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"vLLM benchmark {self.kind!r} is none of {', '.join(KINDS)}")
        least = {"prompt": 1, "generate": 2, "batch": 1, "iterations": 1, "requests": 2}
        least |= {"rounds": 2, "warmups": 1, "concurrency": 1, "threads": 1}
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise UsageError(f"{name} is {value}; expected at least {minimum}")
        if self.request_rate is not None and not self.request_rate > 0:
            raise UsageError(f"request rate is {self.request_rate}; expected more than 0")
        if self.kind != "serve" and (self.request_rate or self.concurrency):
            raise UsageError("request rate and concurrency are of servers: --vllm-bench serve")
        if self.kind != "latency" and self.batch != 1:
            raise UsageError(f"--batch is of --vllm-bench latency; {self.kind} batches by itself")
        if self.precision is not None and self.precision not in DTYPES:
            raise UsageError(
                f"vLLM runs a stock checkpoint in {', '.join(DTYPES)}, not {self.precision!r}"
            )

    @property
    def num_rounds(self) -> int:
        return self.rounds or ROUNDS[self.kind]

    def engine(self, model: Path, context: int | None) -> list[str]:
        """Flags of the engine that loads a model."""
        tokens = self.prompt + self.generate + SLACK
        return [
            *("--model", str(model.resolve())),
            *("--dtype", DTYPES.get(self.precision or "", "auto")),
            *("--max-model-len", str(min(tokens, context or tokens))),
            *self.arguments,
        ]

    def offline(self, model: Path, context: int | None, result: Path) -> list[str]:
        """Arguments of `vllm bench latency` or `throughput`."""
        lengths = {"input-len": self.prompt, "output-len": self.generate}
        # Of throughput, its data set has lengths of its own, which win over the general ones.
        prefix = "--random-" if self.kind == "throughput" else "--"
        each = {
            "latency": [
                *("--batch-size", str(self.batch), "--num-iters", str(self.iterations)),
                *("--num-iters-warmup", str(self.warmups)),
            ],
            "throughput": [
                *("--dataset-name", "random", "--num-prompts", str(self.requests)),
                *("--num-warmups", str(self.warmups)),
            ],
        }[self.kind]
        seed = ("--seed", str(self.seed), "--output-json", str(result))
        asked = [word for name, n in lengths.items() for word in (prefix + name, str(n))]
        return [*self.engine(model, context), *asked, *each, *seed]

    def client(self, model: Path, port: int, result: Path) -> list[str]:
        """Arguments of `vllm bench serve`."""
        traffic = []
        if self.request_rate is not None:
            traffic += ["--request-rate", str(self.request_rate), "--burstiness", "1.0"]
        if self.concurrency is not None:
            traffic += ["--max-concurrency", str(self.concurrency)]
        return [
            *("--backend", "vllm", "--model", str(model.resolve()), "--port", str(port)),
            *("--dataset-name", "random", "--num-prompts", str(self.requests)),
            *("--random-input-len", str(self.prompt), "--random-output-len", str(self.generate)),
            *("--ignore-eos", "--temperature", "0", "--seed", str(self.seed)),
            *("--num-warmups", str(self.warmups), *traffic),
            *("--percentile-metrics", "ttft,tpot,itl,e2el"),
            *("--metric-percentiles", "50,90,95,99", "--save-result", "--save-detailed"),
            *("--result-dir", str(result.parent), "--result-filename", result.name),
        ]


def parse_arguments(text: str) -> tuple[str, ...]:
    """Flags for the engine, quoted as in a shell.

    Raises:
        UsageError: an open quote.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--vllm-args {text!r} cannot be read: {error}") from error


# What vLLM writes -------------------------------------------------------------------------------


def read_times(kind: str, file: Path) -> tuple[dict[str, Any], Times]:
    """A result of vLLM, and the times in it.

    Raises:
        DotexportError: requests failed, or it is not what this benchmark writes.
    """
    said = read_json(file, advice="vLLM's benchmark wrote something else than a JSON object")
    try:
        if kind == "latency":
            return said, {"e2el": [1e3 * s for s in said["latencies"]]}
        if kind == "throughput":
            return said, {"elapsed": [1e3 * said["elapsed_time"]]}
        return _served(said)
    except (KeyError, TypeError) as error:
        raise DotexportError(
            f"vllm bench {kind} wrote no {error}; this release of vLLM reports in another way: "
            "use another, or tell dotexport's authors"
        ) from error


def _served(said: dict[str, Any]) -> tuple[dict[str, Any], Times]:
    failed = [text for text in said["errors"] if text]
    if failed or not said["completed"]:
        raise DotexportError(
            f"{len(failed)} of {said['num_prompts']} requests failed, the first with "
            f"{failed[0].strip().splitlines()[-1] if failed else 'no word'}"
        )
    counts = zip(said["ttfts"], said["itls"], said["output_lens"], strict=True)
    rows = [(1e3 * first, [1e3 * gap for gap in gaps], n) for first, gaps, n in counts]
    times = {
        "ttft": [first for first, _, _ in rows],
        # As vLLM has it: over the tokens that were asked for, however many came in a chunk.
        "tpot": [sum(gaps) / (n - 1) for _, gaps, n in rows if n > 1],
        "itl": [gap for _, gaps, _ in rows for gap in gaps],
        "e2el": [first + sum(gaps) for first, gaps, _ in rows],
    }
    # What vLLM says in sum; the lists behind it are in the times.
    return {key: value for key, value in said.items() if not isinstance(value, list)}, times


# What came out ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One run of a benchmark: vLLM's own report and the times in it, milliseconds."""

    model: str
    group: int
    times: Times
    report: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServedResult:
    """Two models under one of vLLM's benchmarks.

    Attributes:
        runtime: releases of vLLM and what it stands on.
        models: "candidate" and "baseline" -> folder.
    """

    options: ServedOptions
    runtime: Mapping[str, str]
    environment: Mapping[str, Any]
    models: Mapping[str, str]
    turns: tuple[Turn, ...]

    def values(self, model: str, metric: str) -> list[float]:
        return [t for turn in self.turns if turn.model == model for t in turn.times[metric]]

    @property
    def metrics(self) -> list[str]:
        return list(self.turns[0].times)

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """By model and metric, over all its turns."""
        return {
            model: {metric: summarize(self.values(model, metric)) for metric in self.metrics}
            for model in self.models
        }

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Candidate over baseline by metric; gaps between tokens are summed up in TPOT."""
        metrics = [metric for metric in self.metrics if metric != "itl"]
        return {
            metric: compare(
                *(self._by_group(model, metric) for model in self.models), seed=self.options.seed
            )
            for metric in metrics
        }

    def _by_group(self, model: str, metric: str) -> list[list[float]]:
        groups = sorted({turn.group for turn in self.turns})
        return [
            [t for turn in self.turns if (turn.model, turn.group) == (model, group)
             for t in turn.times[metric]]
            for group in groups
        ]  # fmt: skip

    @property
    def verdict(self) -> str:
        """The comparison in words, of whole requests where they were timed."""
        return self.words("elapsed" if self.options.kind == "throughput" else "e2el")

    def words(self, metric: str) -> str:
        found = self.comparisons[metric]
        if found.groups >= ENOUGH_GROUPS:
            return found.verdict
        return (
            f"{1 / found.ratio:.2f}x the speed ({1 / found.high:.2f} to {1 / found.low:.2f} over "
            f"{found.groups} rounds; a verdict needs {ENOUGH_GROUPS}: --vllm-rounds)"
        )

    @cached_property
    def rates(self) -> dict[str, dict[str, float]]:
        """By model: requests and tokens per second, from the time of a whole turn or batch."""
        asked = self.options
        key, count = {
            "latency": ("e2el", asked.batch),
            "throughput": ("elapsed", asked.requests),
            "serve": ("", asked.requests),
        }[asked.kind]
        found = {}
        for model in self.models:
            if asked.kind == "serve":
                spent = [t.report["duration"] for t in self.turns if t.model == model]
                seconds = float(sum(spent)) / len(spent)
            else:
                seconds = self.summaries[model][key].p50 / 1e3
            found[model] = {
                "request_throughput": count / seconds,
                "output_throughput": count * asked.generate / seconds,
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        return self.headline() | {
            "environment": dict(self.environment),
            "turns": [asdict(turn) for turn in self.turns],
        }

    def headline(self) -> dict[str, Any]:
        """Without raw samples."""
        figures = {
            model: {"folder": folder, **self.rates[model], **_named(self.summaries[model])}
            for model, folder in self.models.items()
        }
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "options": asdict(self.options),
            "runtime": dict(self.runtime),
            "comparisons": {
                metric: {**asdict(found), "verdict": self.words(metric)}
                for metric, found in self.comparisons.items()
            },
            **figures,
        }


def _named(summaries: Mapping[str, Summary]) -> dict[str, float]:
    """vLLM's names: mean_ttft_ms, p99_tpot_ms, median_e2el_ms, ..."""
    return {
        f"{name}_{metric}_ms": value
        for metric, summary in summaries.items()
        for name, value in (*asdict(summary).items(), ("median", summary.p50))
    }
