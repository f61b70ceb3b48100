"""Measuring: latency, throughput, memory and bytes of two models on the device at hand."""

if __name__ == "bench":
    raise ImportError("import it as dotexport.bench: a bare `bench` would clash with others")

from .measure import bench, noise_check, sweep
from .result import BenchResult, Measurement, Sample
from .statistics import Comparison, Summary, compare, summarize
from .sweep import Sweep
from .workload import Workload

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
