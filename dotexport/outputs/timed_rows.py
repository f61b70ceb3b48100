"""What benches in turns left in a manifest, for cards and terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def timed_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Label, original, candidate, verdict or change."""
    for name, measured in record.get("bench", {}).items():
        before, after = measured["baseline_ms"], measured["candidate_ms"]
        yield f"{name}, ms", f"{before:.2f}", f"{after:.2f}", measured["verdict"]
    for name, measured in record.get("bench_bytes", {}).items():
        sizes = [value / 1e6 for value in measured]
        yield f"{name}, MB", f"{sizes[0]:.2f}", f"{sizes[1]:.2f}", f"{sizes[1] / sizes[0]:.3f}x"
