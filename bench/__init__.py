"""Measuring: latency, throughput, memory and bytes of two models on the device at hand."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if __name__ == "bench":
    raise ImportError("import it as dotexport.bench: a bare `bench` would clash with others")

if _TYPE_CHECKING:
    from .measure import bench, noise_check, sweep
    from .result import BenchResult, Measurement, Sample
    from .statistics import Comparison, Summary, compare, summarize
    from .sweeps import Sweep
    from .workload import Workload

# Imported when first asked for: a measuring process lives in this package, and what it holds in
# memory is the runtime and the model, no torch.
_HOMES = {
    **dict.fromkeys(["bench", "noise_check", "sweep"], "measure"),
    **dict.fromkeys(["BenchResult", "Measurement", "Sample"], "result"),
    **dict.fromkeys(["Comparison", "Summary", "compare", "summarize"], "statistics"),
    "Sweep": "sweeps",
    "Workload": "workload",
}

__all__ = [
    "BenchResult",
    "Comparison",
    "Measurement",
    "Sample",
    "Summary",
    "Sweep",
    "Workload",
    "bench",
    "compare",
    "noise_check",
    "summarize",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
