"""A bench result for people: one rich table, with the definitions under it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .result import METRICS, BenchResult

Row = tuple[str, str, str, str]
BUSY = 0.5  # load average of the minute before; an idle machine has next to none


def render(result: BenchResult) -> Group:
    """The verdict, the table, its conditions and definitions."""
    table = Table(title=f"{result.target} {result.precision}: candidate against baseline")
    table.add_column("")
    for column in ("candidate", "baseline", "candidate / baseline"):
        table.add_column(column, justify="right")
    for row in rows(result):
        table.add_row(*row)
    lines = [*verdicts(result), *conditions(result)]
    return Group(table, *(Text(line) for line in lines))


def verdicts(result: BenchResult) -> Iterator[str]:
    """The comparisons in words, the whole request first."""
    for metric, label in {"e2el": "end to end", "ttft": "prefill", "tpot": "decode"}.items():
        yield f"{label}: {result.comparisons[metric].verdict}"


def rows(result: BenchResult) -> Iterator[Row]:
    """Label, candidate, baseline and ratio."""
    ours, theirs = result.candidate, result.baseline
    for metric in METRICS:
        for name in ("p50", "p90", "p99"):
            mine, other = (getattr(m.summaries[metric], name) for m in (ours, theirs))
            comparison = result.comparisons.get(metric) if name == "p50" else None
            ratio = _ratio(mine, other)
            if comparison is not None:
                ratio += f" [{comparison.low:.3f}, {comparison.high:.3f}]"
            yield f"{metric.upper()} {name}, ms", f"{mine:.3f}", f"{other:.3f}", ratio
    rates, other_rates = (m.throughput(result.workload) for m in (ours, theirs))
    for key, label in {
        "prefill_tok_s": "prefill, tokens/s",
        "decode_tok_s": "decode, tokens/s",
        "request_throughput": "requests/s",
    }.items():
        yield _row(label, rates[key], other_rates[key], ".1f")
    yield _row("load, s", ours.load_s, theirs.load_s, ".2f")
    yield _row("first run, ms", ours.first_run_ms, theirs.first_run_ms, ".1f")
    yield _row("artifact, MB", ours.artifact_bytes / 1e6, theirs.artifact_bytes / 1e6, ".2f")
    yield _row("peak memory, MB", ours.peak_rss_bytes / 1e6, theirs.peak_rss_bytes / 1e6, ".1f")
    mine, other = ((m.peak_rss_bytes - m.rss_before_load_bytes) / 1e6 for m in (ours, theirs))
    yield _row("... for runtime and model", mine, other, ".1f")
    if ours.num_parameters and theirs.num_parameters:
        yield _row("parameters, M", ours.num_parameters / 1e6, theirs.num_parameters / 1e6, ".2f")


def conditions(result: BenchResult) -> Iterator[str]:
    """What the figures depend on, what to doubt, and what each metric is."""
    asked, machine = result.workload, result.environment
    ours = result.candidate
    groups = len(ours.by_group("e2el"))
    yield (
        f"prompt {asked.prompt_length}, generated {asked.generation_length}, batch "
        f"{asked.batch_size}, {asked.threads} threads; {len(ours.samples)} requests of each model "
        f"in {groups} groups A B B A, seed {asked.seed}"
    )
    yield (
        f"{machine['cpu']}, {machine['platform']}, Python {machine['python']}; load average "
        f"before: {_load(machine['load_average'])}; harness: {ours.harness_overhead_us:.2f} us "
        "in each interval"
    )
    yield (
        "peak memory: most that the process ever held; "
        f"{ours.rss_before_load_bytes / 1e6:.0f} MB of it before runtime and model were loaded"
    )
    yield from _doubts(result)
    for metric, meaning in METRICS.items():
        yield f"{metric.upper()}: {meaning}"


def _doubts(result: BenchResult) -> Iterator[str]:
    for model in (result.candidate, result.baseline):
        if not model.warmed_up:
            yield f"note: the {model.name} was not stable after {model.warmups} warm-up requests"
    load = result.environment["load_average"]
    if load and load[0] > BUSY:
        yield (
            f"note: other work kept {load[0]:.1f} processors busy before this run; absolute times "
            "are too long, and only the comparison can be trusted"
        )


def _row(label: str, mine: float, other: float, form: str) -> Row:
    return label, format(mine, form), format(other, form), _ratio(mine, other)


def _ratio(mine: float, other: float) -> str:
    return f"{mine / other:.3f}" if other else ""


def _load(averages: list[float] | None) -> str:
    return " ".join(f"{value:.2f}" for value in averages) if averages else "unknown"
