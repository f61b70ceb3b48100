"""The one door through which the core asks the bench, at the last moment and by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def benches() -> Any:
    """What bench/for_core.py offers: measuring, gates, comparison, reports."""
    return import_module("dotexport.bench.for_core")
