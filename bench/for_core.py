"""All that the core asks of the bench (dotexport/app/door.py), by name; imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES = {
    "ServedOptions": "vllm.served_reports",
    "Workload": "workload",
    "annotated": "ci",
    "append_history": "history",
    "bench": "measure",
    "bench_encoder": "encoder",
    "bench_pipeline": "diffusion",
    "bench_served": "vllm.served_run",
    "check_options": "measure",
    "find_preset": "presets",
    "frontier": "frontier",
    "frontier_encoder": "encoder_frontier",
    "frontier_as_dict": "report.frontier_words",
    "gate_table": "verdicts",
    "judge": "verdicts",
    "judge_results": "verdicts",
    "measure_again": "promise",
    "measure_table": "latency_measuring",
    "noise_check": "measure",
    "options_in_words": "result",
    "parse_arguments": "vllm.served_reports",
    "read_gate": "gate",
    "render": "table",
    "render_frontier": "report.frontier_words",
    "render_served": "vllm.served_table",
    "render_verdict": "verdicts",
    "require": "gate",
    "steps_of": "sweeps",
    "sweep": "measure",
    "write_frontier": "report.frontier_words",
    "write_junit": "ci",
    "write_report": "report",
    "write_step_summary": "ci",
    "write_trend": "report.trend",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"the bench offers the core no {name!r}")
    return getattr(import_module(f"{__package__}.{HOMES[name]}"), name)
