"""What a bench found: raw samples, and every figure that follows from them.

Only what was measured is stored; summaries and comparisons are computed, so a report that is
read back gives the same figures. Field names of the summaries are those of vLLM's benchmarks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import UsageError

from .statistics import Comparison, Summary, compare, summarize
from .workload import Workload

SCHEMA = "dotexport.bench/1"

METRICS = {
    "ttft": "time to first token: one prefill of the whole prompt, logits of every position",
    "tpot": "time per output token: (end-to-end - TTFT) / (tokens - 1)",
    "itl": "inter-token latency: each gap between two tokens",
    "e2el": "end-to-end latency: one request, prefill and all decode steps",
}
COMPARED = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Sample:
    """One request, in milliseconds.

    Attributes:
        group: which A B B A it belongs to.
        ttft_ms: to the first token.
        itl_ms: from each token to the next.
    """

    group: int
    ttft_ms: float
    itl_ms: tuple[float, ...]

    @property
    def tpot_ms(self) -> float:
        return sum(self.itl_ms) / len(self.itl_ms)

    @property
    def e2el_ms(self) -> float:
        return self.ttft_ms + sum(self.itl_ms)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model on one target.

    Attributes:
        name: "candidate" or "baseline".
        source: the folder that was given.
        artifact: the folder that was loaded; inside `source`, or exported for this bench alone.
        artifact_bytes: of all its files.
        num_parameters: None where only the artifact was at hand.
        vocabulary: width of its logits.
        import_s: importing the runtime.
        load_s: opening the artifact.
        first_run_ms: the first request after that, where runtimes allocate and tune.
        warmups: requests before the first one that counts.
        warmed_up: whether times were stable by then.
        harness_overhead_us: what clock and loop add to every interval.
        rss_before_load_bytes: resident with interpreter, harness and its libraries alone.
        peak_rss_bytes: most the process ever held: all that, runtime, weights, cache, logits.
        providers: what the runtime says it runs on, where it says so.
    """

    name: str
    source: str
    artifact: str
    artifact_bytes: int
    num_parameters: int | None
    vocabulary: int
    import_s: float
    load_s: float
    first_run_ms: float
    warmups: int
    warmed_up: bool
    harness_overhead_us: float
    rss_before_load_bytes: int
    peak_rss_bytes: int
    providers: tuple[str, ...]
    samples: tuple[Sample, ...]

    def values(self, metric: str) -> list[float]:
        """All values of one of METRICS, in milliseconds."""
        if metric == "itl":
            return [gap for sample in self.samples for gap in sample.itl_ms]
        return [getattr(sample, f"{metric}_ms") for sample in self.samples]

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        return {metric: summarize(self.values(metric)) for metric in METRICS}

    def by_group(self, metric: str) -> NDArray[np.float64]:
        """Values by A B B A group and sample."""
        groups: dict[int, list[float]] = {}
        for sample in self.samples:
            groups.setdefault(sample.group, []).append(getattr(sample, f"{metric}_ms"))
        return np.array([groups[number] for number in sorted(groups)])

    def throughput(self, workload: Workload) -> dict[str, float]:
        """Rates: the first three over all measured time, as vLLM has it; the others of medians."""
        busy_s = sum(self.values("e2el")) / 1e3
        prompt = workload.batch_size * workload.prompt_length
        output = workload.batch_size * workload.generation_length
        runs = len(self.samples)
        return {
            "request_throughput": runs * workload.batch_size / busy_s,
            "output_throughput": runs * output / busy_s,
            "total_token_throughput": runs * (prompt + output) / busy_s,
            "prefill_tok_s": prompt / self.summaries["ttft"].p50 * 1e3,
            "decode_tok_s": workload.batch_size / self.summaries["tpot"].p50 * 1e3,
        }

    def as_dict(self, workload: Workload) -> dict[str, Any]:
        stored = asdict(self)
        samples = stored.pop("samples")
        figures: dict[str, float] = {"duration_s": sum(self.values("e2el")) / 1e3}
        for metric, summary in self.summaries.items():
            figures |= {f"{name}_{metric}_ms": value for name, value in asdict(summary).items()}
            figures[f"median_{metric}_ms"] = summary.p50
        return {
            **stored,
            "completed": len(samples),
            **figures,
            **self.throughput(workload),
            "samples": samples,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Measurement:
        fields = {name: stored[name] for name in cls.__dataclass_fields__}
        samples = (Sample(s["group"], s["ttft_ms"], tuple(s["itl_ms"])) for s in stored["samples"])
        return cls(**fields | {"samples": tuple(samples), "providers": tuple(stored["providers"])})


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Two models under one workload on one target, and how they compare."""

    target: str
    precision: str
    workload: Workload
    environment: dict[str, Any]
    candidate: Measurement
    baseline: Measurement

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Candidate over baseline by metric; below 1 is faster."""
        return {
            metric: compare(
                self.candidate.by_group(metric),
                self.baseline.by_group(metric),
                seed=self.workload.seed,
            )
            for metric in COMPARED
        }

    @property
    def verdict(self) -> str:
        """The end-to-end comparison in words."""
        return self.comparisons["e2el"].verdict

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: what was measured and what follows from it."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "target": self.target,
            "precision": self.precision,
            "workload": self.workload.as_dict(),
            "comparisons": {
                metric: {**asdict(comparison), "verdict": comparison.verdict}
                for metric, comparison in self.comparisons.items()
            },
            "metrics": METRICS,
            "environment": self.environment,
            "candidate": self.candidate.as_dict(self.workload),
            "baseline": self.baseline.as_dict(self.workload),
        }

    def headline(self) -> dict[str, Any]:
        """The report without raw samples and conditions, small enough for one line."""
        figures = self.as_dict()
        small = {key: figures[key] for key in ("schema", "verdict", "target", "precision")}
        for name in ("candidate", "baseline"):
            model = figures[name]
            small[name] = {key: value for key, value in model.items() if key != "samples"}
        return small | {"workload": figures["workload"], "comparisons": figures["comparisons"]}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> BenchResult:
        """The result that `as_dict` described.

        Raises:
            UsageError: another kind of report, or another version of this one.
        """
        if stored.get("schema") != SCHEMA:
            raise UsageError(
                f"not a bench report: schema is {stored.get('schema')!r}, expected {SCHEMA!r}"
            )
        return cls(
            target=stored["target"],
            precision=stored["precision"],
            workload=Workload(**stored["workload"]),
            environment=stored["environment"],
            candidate=Measurement.from_dict(stored["candidate"]),
            baseline=Measurement.from_dict(stored["baseline"]),
        )
