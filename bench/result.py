"""What a bench found: raw samples, and every figure that follows from them.

Only what was measured is stored; summaries and comparisons are computed, so a report that is
read back gives the same figures. Field names of the summaries are those of vLLM's benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage.schema import validated

from .counts import Cost
from .roofline import Rates, Roofline
from .statistics import ENOUGH_GROUPS, Comparison, Summary, compare, summarize
from .workload import Workload

SCHEMA = "dotexport.bench/1"
AGAIN = "it is damaged or of another version: measure again with `dotexport bench`"

METRICS = {
    "ttft": "time to first token: one prefill of the whole prompt, with what logits the runtime "
    "gives (torch, llama.cpp: of the last position; graphs: of every one)",
    "tpot": "time per output token: (end-to-end - TTFT) / (tokens - 1)",
    "itl": "inter-token latency: each gap between two tokens",
    "e2el": "end-to-end latency: one request, prefill and all decode steps",
}
COMPARED = ("ttft", "tpot", "e2el")


SAID_OF_OPTIONS = {"compiled": "compiled", "llama_cpp": "llama.cpp"}


def options_in_words(runtime: Mapping[str, Any]) -> list[str]:
    """Options of a target that were chosen, short enough for a name.

    >>> options_in_words({"dtype": "bf16", "compiled": True, "device": None})
    ['bf16', 'compiled']
    """
    return [SAID_OF_OPTIONS.get(name, str(value)) for name, value in runtime.items() if value]


@dataclass(frozen=True)
class Sample:
    """One request, in milliseconds.

    Attributes:
        group: which A B B A it belongs to.
        ttft_ms: to the first token.
        itl_ms: from each token to the next.
        round: which pair of processes it was asked of.
    """

    group: int
    ttft_ms: float
    itl_ms: tuple[float, ...]
    round: int = 0

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
        peak_device_bytes: most it ever held on the GPU; None: no GPU, or nobody says.
        answered_positions: of a prompt, for which the runtime gives logits.
        energy: joules of all measured requests and per generated token, and what counted them; or
            the reason why nothing did.
        cost: bytes and operations of a token; None: its shapes are not known.

    Where several processes answer at once, memory is the sum over them (what they share counted
    each time); over rounds, times of loading are medians and memory is the largest.
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
    peak_device_bytes: int | None = None
    answered_positions: int | None = None
    energy: dict[str, Any] | None = None
    cost: Cost | None = None

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
        """Rates: the first three over all measured time, as vLLM has it; the others of medians.

        Of all concurrent processes together.
        """
        clients = workload.concurrency
        busy_s = sum(self.values("e2el")) / 1e3 / clients
        prompt = workload.batch_size * workload.prompt_length
        output = workload.batch_size * workload.generation_length
        runs = len(self.samples)
        return {
            "request_throughput": runs * workload.batch_size / busy_s,
            "output_throughput": runs * output / busy_s,
            "total_token_throughput": runs * (prompt + output) / busy_s,
            "prefill_tok_s": clients * prompt / self.summaries["ttft"].p50 * 1e3,
            "decode_tok_s": clients * workload.batch_size / self.summaries["tpot"].p50 * 1e3,
        }

    @property
    def overhead_share(self) -> float:
        """Of the time per output token that is the harness's own."""
        return self.harness_overhead_us / 1e3 / self.summaries["tpot"].p50

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
            "harness_overhead_share": self.overhead_share,
            **figures,
            **self.throughput(workload),
            "samples": samples,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Measurement:
        # Fields that came later are missing from older reports and have defaults.
        fields = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored}
        samples = (
            Sample(s["group"], s["ttft_ms"], tuple(s["itl_ms"]), s.get("round", 0))
            for s in stored["samples"]
        )
        cost = Cost(**stored["cost"]) if stored.get("cost") else None
        lists = {"samples": tuple(samples), "providers": tuple(stored["providers"])}
        return cls(**fields | lists | {"cost": cost})


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Two models under one workload on one target, and how they compare.

    Attributes:
        runtime: options of the target, such as device and dtype of torch.
        rates: what the device did at best meanwhile; None: nobody asked, or shapes are not known.
    """

    target: str
    precision: str
    workload: Workload
    environment: dict[str, Any]
    candidate: Measurement
    baseline: Measurement
    runtime: dict[str, Any] = field(default_factory=dict)
    rates: Rates | None = None

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Candidate over baseline by metric; below 1 is faster."""
        return {
            metric: compare(
                self.candidate.by_group(metric),
                self.baseline.by_group(metric),
                rounds=len({sample.round for sample in self.candidate.samples}),
                seed=self.workload.seed,
            )
            for metric in COMPARED
        }

    @property
    def verdict(self) -> str:
        """The end-to-end comparison in words."""
        return self.comparisons["e2el"].verdict

    @cached_property
    def roofline(self) -> Roofline | None:
        """How far from the device's limits; None without rates or shapes."""
        models = (self.candidate, self.baseline)
        return Roofline.of(models, self.rates, self.workload, self.comparisons)

    @property
    def noise_verdict(self) -> str | None:
        """PASS or FAIL in words, where a model was measured against itself; else None."""
        if self.candidate.artifact != self.baseline.artifact:
            return None
        found = self.comparisons["e2el"]
        if found.groups < ENOUGH_GROUPS:
            return found.verdict
        where = f"the 95 % interval of A against A, {found.low:.3f} to {found.high:.3f},"
        if not found.low <= 1 <= found.high:
            return f"FAIL: {where} does not hold 1; other work disturbs this machine too much"
        blind = max(1 - found.low, found.high - 1)
        return f"PASS: {where} holds 1; differences below {100 * blind:.1f} % stay unseen here"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: what was measured and what follows from it."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "target": self.target,
            "precision": self.precision,
            "runtime": self.runtime,
            "noise_check": self.noise_verdict,
            "workload": self.workload.as_dict(),
            "comparisons": {
                metric: {**asdict(comparison), "verdict": comparison.verdict}
                for metric, comparison in self.comparisons.items()
            },
            "rates": self.rates and self.rates.as_dict(),
            "roofline": self.roofline and self.roofline.as_dict(),
            "limit": self.roofline and self.roofline.headline(),
            "metrics": METRICS,
            "environment": self.environment,
            "candidate": self.candidate.as_dict(self.workload),
            "baseline": self.baseline.as_dict(self.workload),
        }

    def headline(self) -> dict[str, Any]:
        """The report without raw samples and conditions, small enough for one line."""
        figures = self.as_dict()
        kept = ("schema", "verdict", "target", "precision", "runtime", "noise_check", "limit")
        small = {key: figures[key] for key in kept}
        for name in ("candidate", "baseline"):
            model = figures[name]
            small[name] = {key: value for key, value in model.items() if key != "samples"}
        return small | {"workload": figures["workload"], "comparisons": figures["comparisons"]}

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: str = "the report") -> BenchResult:
        """The result that `as_dict` described; `where` it stands, for messages.

        Raises:
            UsageError: another kind of report, or another version of this one.
            CheckpointError: damaged, or edited into what no bench measures.
        """
        if stored.get("schema") != SCHEMA:
            raise UsageError(
                f"{where} is not a bench report: schema is {stored.get('schema')!r}, expected "
                f"{SCHEMA!r}"
            )
        from .stored_result import StoredResult

        validated(StoredResult, stored, where, error=CheckpointError, advice=AGAIN)
        return cls(
            target=stored["target"],
            precision=stored["precision"],
            workload=_workload(stored["workload"], where),
            environment=stored["environment"],
            candidate=Measurement.from_dict(stored["candidate"]),
            baseline=Measurement.from_dict(stored["baseline"]),
            runtime=stored.get("runtime", {}),
            rates=Rates.from_dict(stored["rates"]) if stored.get("rates") else None,
        )


def _workload(stored: dict[str, Any], where: str) -> Workload:
    # A report from before there were rounds is of one.
    rounds = {"rounds": 1, **stored}
    return validated(Workload, rounds, f"{where}: workload", error=CheckpointError, advice=AGAIN)
