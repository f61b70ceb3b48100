"""How far from the device's limit: what a pass must read and compute, over what the device can.

A phase cannot take less than its bytes over the bandwidth, nor less than its operations over the
matrix rate. The longer of the two binds, and the share of the measured time that it explains says
whether a narrower model can be faster here at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from .counts import Cost, Work
from .statistics import Comparison, Summary
from .workload import Workload

TIMES = {"decode": "tpot", "prefill": "ttft"}
MOSTLY = 0.5  # share of the time from which on a limit is what binds
DRIFT = 0.15


@dataclass(frozen=True)
class Rates:
    """What the device did at best, before and after the models ran.

    Attributes:
        device: "cpu" or "cuda".
        memory: bytes of the array -> bytes per second, each time.
        arithmetic: kind of number -> operations per second, each time; empty: no such product.
    """

    device: str
    memory: dict[int, tuple[float, ...]]
    arithmetic: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, device: str, moments: Sequence[dict[str, Any]]) -> Rates:
        """From what probe.measure gave, moment by moment."""
        sizes = sorted({size for moment in moments for size, _ in moment["memory"]})
        memory = {
            size: tuple(rate for m in moments for n, rate in m["memory"] if n == size)
            for size in sizes
        }
        arithmetic = {
            number: tuple(m["arithmetic"][number] for m in moments if m["arithmetic"][number])
            for number in moments[0]["arithmetic"]
        }
        return cls(device, memory, arithmetic)

    def bandwidth(self, num_bytes: float) -> float:
        """Bytes per second when so many are read again and again; between sizes interpolated."""
        sizes = np.log(np.array(list(self.memory), dtype=float))
        rates = [float(np.mean(values)) for values in self.memory.values()]
        return float(np.interp(np.log(num_bytes), sizes, rates))

    def matrix_rate(self, number: str) -> float:
        """Operations per second; where there is no such product, those of fp32."""
        return float(np.mean(self.arithmetic.get(number) or self.arithmetic["fp32"]))

    @property
    def drift(self) -> float:
        """Largest relative change between two moments."""
        every = [v for v in (*self.memory.values(), *self.arithmetic.values()) if v]
        return max(max(values) / min(values) - 1 for values in every)

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "memory": [
                {"bytes": size, "bytes_per_s": list(rates)} for size, rates in self.memory.items()
            ],
            "arithmetic": {number: list(rates) for number, rates in self.arithmetic.items()},
            "drift": self.drift,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Rates:
        return cls(
            stored["device"],
            {row["bytes"]: tuple(row["bytes_per_s"]) for row in stored["memory"]},
            {number: tuple(rates) for number, rates in stored["arithmetic"].items()},
        )


@dataclass(frozen=True)
class Limit:
    """One phase of one model against the device.

    Attributes:
        num_bytes, flops: of one pass, all concurrent processes together.
        bytes_ms: least time to move the bytes.
        arithmetic_ms: least time for the operations.
        measured_ms: median of what it took.
    """

    num_bytes: float
    flops: float
    bytes_ms: float
    arithmetic_ms: float
    measured_ms: float

    @property
    def limit_ms(self) -> float:
        return max(self.bytes_ms, self.arithmetic_ms)

    @property
    def share(self) -> float:
        """Of the limit that was reached: 1 is as fast as the device allows."""
        return self.limit_ms / self.measured_ms

    @property
    def nearest(self) -> str:
        return "bytes" if self.bytes_ms >= self.arithmetic_ms else "arithmetic"

    @property
    def binds(self) -> str:
        """bytes, arithmetic, or overhead: launches, small kernels, what no limit explains."""
        return self.nearest if self.share >= MOSTLY else "overhead"

    def as_dict(self) -> dict[str, Any]:
        derived = ("limit_ms", "share", "nearest", "binds")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Gain:
    """What narrowing can bring in one phase on this device, and what it brought; 1.2 is faster.

    Attributes:
        at_the_limit: ratio of the two limits: if all of the time shrank with them.
        beside_overhead: if the rest of the baseline's time stayed as it is.
        achieved: ratio of median times at equal pace.
    """

    at_the_limit: float
    beside_overhead: float
    achieved: float

    @classmethod
    def of(cls, candidate: Limit, baseline: Limit, achieved: float) -> Gain:
        saved = baseline.limit_ms - candidate.limit_ms
        left = max(baseline.measured_ms - saved, candidate.limit_ms)
        return cls(
            baseline.limit_ms / candidate.limit_ms,
            baseline.measured_ms / left,
            achieved,
        )


class Timed(Protocol):
    """What a limit asks of a measured model."""

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> Cost | None: ...

    @property
    def answered_positions(self) -> int | None: ...

    @property
    def summaries(self) -> Mapping[str, Summary]: ...


def limit(phase: str, model: Timed, cost: Cost, rates: Rates, asked: Workload) -> Limit:
    """One phase of TIMES."""
    answered = model.answered_positions or asked.prompt_length
    work = cost.decode(asked) if phase == "decode" else cost.prefill(asked, answered)
    # Concurrent processes share the device, and each reads weights of its own.
    work = Work(work.num_bytes * asked.concurrency, work.flops * asked.concurrency)
    return Limit(
        work.num_bytes,
        work.flops,
        work.num_bytes / rates.bandwidth(work.num_bytes) * 1e3,
        work.flops / rates.matrix_rate(cost.number) * 1e3,
        model.summaries[TIMES[phase]].p50,
    )


@dataclass(frozen=True)
class Roofline:
    """Limits by model and phase, and gains by phase."""

    rates: Rates
    limits: dict[str, dict[str, Limit]]
    gains: dict[str, Gain]

    @classmethod
    def of(
        cls,
        models: Sequence[Timed],
        rates: Rates | None,
        asked: Workload,
        comparisons: Mapping[str, Comparison],
    ) -> Roofline | None:
        """None where the device was not measured, or a model's shapes are not known.

        Args:
            models: candidate and baseline.
        """
        if rates is None or any(model.cost is None for model in models):
            return None
        limits = {
            model.name: {
                phase: limit(phase, model, model.cost, rates, asked)
                for phase in TIMES
                if model.cost
            }
            for model in models
        }
        gains = {
            phase: Gain.of(
                limits["candidate"][phase],
                limits["baseline"][phase],
                1 / comparisons[metric].ratio,
            )
            for phase, metric in TIMES.items()
        }
        return cls(rates, limits, gains)

    def as_dict(self) -> dict[str, Any]:
        return {
            **{
                name: {phase: one.as_dict() for phase, one in phases.items()}
                for name, phases in self.limits.items()
            },
            "gains": {phase: asdict(gain) for phase, gain in self.gains.items()},
        }

    def headline(self) -> str:
        """What a decoded token is held back by, and what narrowing can bring: one sentence."""
        found, gain = self.limits["baseline"]["decode"], self.gains["decode"]
        return (
            f"the baseline's decode runs at {_percent(found.share)} of {_of(found)} "
            f"({_binds(found)}); these sizes can bring {gain.at_the_limit:.2f}x at the limit, "
            f"{gain.beside_overhead:.2f}x if the rest of the time stays, and brought "
            f"{gain.achieved:.2f}x"
        )

    def sentences(self) -> Iterator[str]:
        for phase in TIMES:
            parts = []
            for name, phases in self.limits.items():
                found = phases[phase]
                parts.append(f"{name} at {_percent(found.share)} of {_of(found)} ({_binds(found)})")
            gain = self.gains[phase]
            yield (
                f"{phase} limit: {'; '.join(parts)}; narrowing can bring {gain.at_the_limit:.2f}x "
                f"at the limit, {gain.beside_overhead:.2f}x beside the overhead; it brought "
                f"{gain.achieved:.2f}x"
            )
        yield f"device: {self.device()}"
        if any(one.share > 1 for phases in self.limits.values() for one in phases.values()):
            yield (
                "note: more than 100 % means that the runtime reads or multiplies faster than "
                "torch's kernels did here, or that caches serve part of it"
            )
        if self.rates.drift > DRIFT:
            yield (
                f"note: the device's own rates changed by {_percent(self.rates.drift)} between "
                "before and after; shares of the limit are as uncertain"
            )

    def device(self) -> str:
        memory = ", ".join(
            f"{np.mean(rates) / 1e9:.1f} GB/s over {size / 1e6:.0f} MB"
            for size, rates in self.rates.memory.items()
        )
        products = ", ".join(
            f"{number} {np.mean(rates) / 1e9:.0f} GFLOP/s"
            for number, rates in self.rates.arithmetic.items()
            if rates
        )
        return f"memory {memory}; matrix products {products}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _of(found: Limit) -> str:
    return "the memory bandwidth" if found.nearest == "bytes" else "the matrix rate"


def _binds(found: Limit) -> str:
    return "overhead is most of the time" if found.binds == "overhead" else f"{found.binds} bind"
