"""A bench result for people: one rich table, with the definitions under it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .result import METRICS, BenchResult, options_in_words
from .sweeps import Sweep

Row = tuple[str, str, str, str]
SWEEP_COLUMNS = (
    "tokens",
    "batch",
    "threads",
    "processes",
    "prefill tok/s",
    "speed-up",
    "decode tok/s",
    "speed-up",
    "of decode limit",
)
BUSY = 0.5  # load average of the minute before; an idle machine has next to none


def render(result: BenchResult | Sweep) -> Group:
    """The verdict, the table, its conditions and definitions."""
    if isinstance(result, Sweep):
        return _render_sweep(result)
    table = Table(title=f"{_runtime(result)}: candidate against baseline")
    table.add_column("")
    for column in ("candidate", "baseline", "candidate / baseline"):
        table.add_column(column, justify="right")
    for row in rows(result):
        table.add_row(*row)
    lines = [*busy(result), *verdicts(result), *conditions(result)]
    return Group(table, *(Text(line) for line in lines))


def _render_sweep(sweep: Sweep) -> Group:
    one = sweep.results[0]
    table = Table(title=f"{_runtime(one)}: candidate against baseline, by workload")
    for column in SWEEP_COLUMNS:
        table.add_column(column, justify="right")
    for result in sweep.results:
        table.add_row(*sweep_row(result))
    lines = [*busy(one), *([sweep.noise_verdict] if sweep.noise_verdict else [])]
    lines += [f"{_shape(result)}: {result.verdict}" for result in sweep.results]
    lines += _machine(one)
    lines += [f"{metric.upper()}: {meaning}" for metric, meaning in METRICS.items()]
    return Group(table, *(Text(line) for line in lines))


def sweep_row(result: BenchResult) -> list[str]:
    """Cells of SWEEP_COLUMNS."""
    asked, found = result.workload, result.comparisons
    rates = [model.throughput(asked) for model in (result.candidate, result.baseline)]
    cells = [f"{asked.prompt_length}+{asked.generation_length}", str(asked.batch_size)]
    cells += [str(asked.threads), str(asked.concurrency)]
    for metric, rate in {"ttft": "prefill_tok_s", "tpot": "decode_tok_s"}.items():
        one = found[metric]
        cells.append(f"{rates[0][rate]:.1f} / {rates[1][rate]:.1f}")
        ratio = rates[0][rate] / rates[1][rate]
        cells.append(f"{ratio:.2f}x [{1 / one.high:.2f}, {1 / one.low:.2f}]")
    limits = result.roofline and result.roofline.limits
    cells.append(
        " / ".join(f"{100 * limits[name]['decode'].share:.0f} %" for name in limits)
        if limits
        else ""
    )
    return cells


def verdicts(result: BenchResult) -> Iterator[str]:
    """The comparisons in words, the whole request first; then how far the device's limits are."""
    if result.noise_verdict:
        yield result.noise_verdict
    for metric, label in {"e2el": "end to end", "ttft": "prefill", "tpot": "decode"}.items():
        yield f"{label}: {result.comparisons[metric].verdict}"
    if result.roofline:
        yield from result.roofline.sentences()


def rows(result: BenchResult) -> Iterator[Row]:
    """Label, candidate, baseline and ratio."""
    ours, theirs = result.candidate, result.baseline
    for metric in METRICS:
        for name in ("p50", "p90", "p99"):
            mine, other = (getattr(m.summaries[metric], name) for m in (ours, theirs))
            comparison = result.comparisons.get(metric) if name == "p50" else None
            ratio = _ratio(mine, other)
            if comparison is not None:  # the interval is of medians at equal pace
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
    if ours.peak_device_bytes and theirs.peak_device_bytes:
        yield _row(
            "peak on the GPU, MB",
            ours.peak_device_bytes / 1e6,
            theirs.peak_device_bytes / 1e6,
            ".1f",
        )
    energy = [(model.energy or {}).get("joules_per_token") for model in (ours, theirs)]
    if energy[0] and energy[1]:
        yield _row("energy, J per token", energy[0], energy[1], ".3f")
    if ours.num_parameters and theirs.num_parameters:
        yield _row("parameters, M", ours.num_parameters / 1e6, theirs.num_parameters / 1e6, ".2f")


def conditions(result: BenchResult) -> Iterator[str]:
    """What the figures depend on, what to doubt, and what each metric is."""
    asked, ours = result.workload, result.candidate
    groups = len(ours.by_group("e2el"))
    yield (
        f"{_shape(result)}; {len(ours.samples)} requests of each model in {groups} groups A B B A, "
        f"{asked.rounds} rounds of fresh processes, seed {asked.seed}"
    )
    yield from _machine(result)
    yield (
        "peak memory: most that the process ever held; "
        f"{ours.rss_before_load_bytes / 1e6:.0f} MB of it before runtime and model were loaded"
    )
    yield from _doubts(result)
    for metric, meaning in METRICS.items():
        yield f"{metric.upper()}: {meaning}"


def _runtime(result: BenchResult) -> str:
    return " ".join([result.target, result.precision, *options_in_words(result.runtime)])


def _shape(result: BenchResult) -> str:
    asked = result.workload
    clients = f", {asked.concurrency} processes at once" if asked.concurrency > 1 else ""
    return (
        f"prompt {asked.prompt_length}, generated {asked.generation_length}, batch "
        f"{asked.batch_size}, {asked.threads} threads{clients}"
    )


def _machine(result: BenchResult) -> Iterator[str]:
    machine, ours = result.environment, result.candidate
    gpus = "".join(f", {gpu['name']}" for gpu in machine.get("gpus", ()))
    on = f"; runs on {', '.join(ours.providers)}" if ours.providers else ""
    yield (
        f"{machine['cpu']}{gpus}, {machine['platform']}, Python {machine['python']}{on}; governor "
        f"{machine.get('governor') or 'unknown'}; load average before: "
        f"{_load(machine['load_average'])}"
    )
    yield (
        f"harness: {ours.harness_overhead_us:.2f} us in each interval, "
        f"{100 * ours.overhead_share:.2f} % of a token"
    )
    energy = ours.energy or {}
    yield f"energy: {energy.get('source') or 'not measured, ' + energy.get('reason', 'unknown')}"


def _doubts(result: BenchResult) -> Iterator[str]:
    for model in (result.candidate, result.baseline):
        if not model.warmed_up:
            yield f"note: the {model.name} was not stable after {model.warmups} warm-up requests"


def busy(result: BenchResult) -> Iterator[str]:
    """That other work ran beside the bench, which is said before any figure."""
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
