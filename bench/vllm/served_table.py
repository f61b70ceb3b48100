"""What vLLM's benchmarks say of two models, for people: one rich table and its conditions."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..vllm.served_reports import ServedResult


def render_served(result: ServedResult) -> Group:
    """The table, the comparisons in words, and what they depend on."""
    table = Table(title=f"vllm bench {result.options.kind}: candidate against baseline")
    table.add_column("")
    for column in ("candidate", "baseline", "candidate / baseline"):
        table.add_column(column, justify="right")
    for row in rows(result):
        table.add_row(*row)
    words = (f"{metric.upper()}: {result.words(metric)}" for metric in result.comparisons)
    return Group(table, *(Text(line) for line in (*words, *conditions(result))))


def conditions(result: ServedResult) -> Iterator[str]:
    """Lengths, traffic, turns, releases and machine."""
    asked = result.options
    traffic = {
        "latency": f"batch {asked.batch}, {asked.iterations} of them in each turn",
        "throughput": f"{asked.requests} requests in each turn",
        "serve": f"{asked.requests} requests in each turn, "
        + (f"{asked.request_rate:g} a second (Poisson)" if asked.request_rate else "all at once")
        + (f", {asked.concurrency} under way at most" if asked.concurrency else ""),
    }[asked.kind]
    yield (
        f"prompt {asked.prompt}, generated {asked.generate}, {traffic}, {asked.warmups} before it; "
        f"{asked.num_rounds} rounds A B B A, seed {asked.seed}"
    )
    releases = ", ".join(f"{name} {release}" for name, release in result.runtime.items())
    told = result.environment
    gpus = "".join(f", {gpu['name']}" for gpu in told.get("gpus", ()))
    yield (
        f"{releases}; {told['cpu']}{gpus}, {told['platform']}; governor "
        f"{told.get('governor') or 'unknown'}"
    )


def rows(result: ServedResult) -> Iterator[tuple[str, str, str, str]]:
    """Label, candidate, baseline and ratio."""
    ours, theirs = (result.summaries[model] for model in result.models)
    for metric in result.metrics:
        for name in ("p50", "p99"):
            mine, other = (getattr(summaries[metric], name) for summaries in (ours, theirs))
            ratio = f"{mine / other:.3f}"
            if name == "p50" and (found := result.comparisons.get(metric)):
                ratio += f" [{found.low:.3f}, {found.high:.3f}]"
            yield f"{metric.upper()} {name}, ms", f"{mine:.3f}", f"{other:.3f}", ratio
    for key in ("request_throughput", "output_throughput"):
        mine, other = (result.rates[model][key] for model in result.models)
        yield key.replace("_", " ") + ", 1/s", f"{mine:.2f}", f"{other:.2f}", f"{mine / other:.3f}"
