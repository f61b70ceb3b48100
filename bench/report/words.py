"""What a report says in words and tables: the summary, parity, environment, how to reproduce."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dotexport.outputs import summary
from dotexport.version import __version__

from ..result import METRICS
from ..table import busy, conditions, verdicts
from .collected import Output


@dataclass(frozen=True)
class Table:
    """A table; its first column heads each row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Card:
    """One figure of the summary, large."""

    label: str
    figure: str
    detail: str


def cards(output: Output) -> Iterator[Card]:
    """The few figures that matter first: size, quality, speed, memory."""
    sizes = output.record.get("sizes", {}).get("parameters")
    if sizes:
        before, after = sizes
        yield Card("parameters", f"{after / before:.2f}×", f"{_count(before)} → {_count(after)}")
    if found := output.quality:
        ratio = found["perplexity"] / found["baseline_perplexity"]
        detail = f"{found['baseline_perplexity']:.2f} → {found['perplexity']:.2f}"
        yield Card("perplexity", f"{ratio:.2f}×", detail)
    bench = next((b for b in output.benches if not b.swept), None) or next(
        iter(output.benches), None
    )
    if bench is None:
        return
    decode = bench.result.comparisons["tpot"]
    measurable = decode.faster or decode.slower
    shown = f"{1 / decode.ratio:.2f}×" if measurable else "no measurable gain"
    interval = f"{1 / decode.high:.2f} to {1 / decode.low:.2f}, {bench.label}"
    yield Card("decode speed", shown, interval)
    ours, theirs = (m.peak_rss_bytes for m in (bench.result.candidate, bench.result.baseline))
    detail = f"{theirs / 1e6:,.0f} → {ours / 1e6:,.0f} MB"
    yield Card("peak memory", f"{ours / theirs:.2f}×", detail)


def sentences(output: Output) -> Iterator[str]:
    """A busy machine first; size, quality and speed in words; what brought nothing is said, too."""
    for bench in output.benches[:1]:
        for line in busy(bench.result):
            yield f"{bench.label}: {line.removeprefix('note: ')}."
    if sizes := output.record.get("sizes", {}).get("parameters"):
        before, after = sizes
        percent = 100 * (1 - after / before)
        yield (
            f"{output.model} was narrowed from {before:,} to {after:,} parameters, "
            f"{percent:.0f} % fewer."
        )
    if found := output.quality:
        yield _quality_sentence(found)
        if doubt := found.get("one_source"):
            yield f"To be doubted: {doubt}."
        for row in (found.get("generation") or {}).get("rows", []):
            yield from (f"{row['model']}, {row['kind']}: {words}." for words in row["words"])
        yield from map(_task_sentence, found.get("tasks") or ())
    for bench in output.benches:
        if bench.swept:
            continue
        said = dict(line.split(": ", 1) for line in verdicts(bench.result))
        yield (
            f"On {bench.label}: prefill {said['prefill']}; decode {said['decode']}; end to end "
            f"{said['end to end']}."
        )
    if swept := [bench.result for bench in output.benches if bench.swept]:
        gains = [1 / result.comparisons["tpot"].ratio for result in swept]
        yield (
            f"Over {len(swept)} workloads of a sweep, decode is {min(gains):.2f}x to "
            f"{max(gains):.2f}x as fast."
        )
    failed = [
        name
        for name, artifact in output.record.get("artifacts", {}).items()
        if artifact.get("parity") and not artifact["parity"]["passed"]
    ]
    if failed:
        yield f"Parity failed: {', '.join(failed)} does not compute what torch computes."
        return
    proven = output.record.get("artifacts", {})
    passed = {n: a["parity"] for n, a in proven.items() if (a.get("parity") or {}).get("passed")}
    rounded = {n: parity for n, parity in passed.items() if "-int" in n}
    if exact := [name for name in passed if name not in rounded]:
        yield f"Every artifact computes what torch computes: {', '.join(exact)}."
    for name, parity in rounded.items():
        yield _rounding_sentence(name, parity)


def overview(output: Output) -> Table:
    """The rows of the model card."""
    if output.is_pipeline:
        from dotexport.diffusion import pipeline_card

        found: Sequence[Any] = list(pipeline_card.rows(dict(output.record)))
    else:
        found = list(summary.rows(output.record))
    rows = tuple(tuple(_words(cell) for cell in row) for row in found)
    return Table("Original beside narrowed", ("", "original", "narrowed", "change"), rows)


def parity(output: Output) -> Table | None:
    """Each artifact against torch: worst phase, its limit, verdict."""
    verified = output.verify.get("artifacts") or {
        name: artifact["parity"]
        for name, artifact in output.record.get("artifacts", {}).items()
        if artifact.get("parity")
    }
    rows = tuple(_parity_row(name, found) for name, found in verified.items() if "phases" in found)
    columns = (
        "artifact",
        "worst logit difference",
        "KL, nats",
        "same top token",
        "perplexity over torch",
        "verdict",
    )
    if not rows:
        return None
    told = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    rows = tuple(tuple(row[n] for n in told) for row in rows)
    heads = tuple(columns[n] for n in told)
    return Table("Every artifact against torch (limit in brackets)", heads, rows)


def environment(output: Output) -> Table:
    """What figures depend on, of the narrowing and of each bench."""
    made = output.record.get("environment", {})
    columns = [("narrowing", made)]
    for bench in output.benches:
        columns.append((bench.label, bench.result.environment))
    apart = ("libraries", "load_average", "roofline")  # shown elsewhere
    names = [n for n in dict.fromkeys(k for _, e in columns for k in e) if n not in apart]
    libraries = list(dict.fromkeys(k for _, e in columns for k in e.get("libraries", {})))
    rows = [(_words(name), *(_said(e.get(name)) for _, e in columns)) for name in names]
    rows += [(n, *(e.get("libraries", {}).get(n, "") for _, e in columns)) for n in libraries]
    rows = [row for row in rows if any(row[1:])]
    labels = ("", *(name for name, _ in columns))
    return _merged(Table("Where it was made and measured", labels, tuple(rows)))


def workloads(output: Output) -> list[tuple[str, list[str]]]:
    """What each bench asked and what to doubt, in the words of the bench itself."""
    told = []
    for bench in output.benches:
        lines = [line for line in conditions(bench.result) if not line.startswith(_definitions())]
        told.append((bench.label, lines))
    return told


def definitions() -> list[tuple[str, str]]:
    return [(metric.upper(), meaning) for metric, meaning in METRICS.items()]


def limits(output: Output) -> Iterator[tuple[str, list[str], Table]]:
    """What binds: by bench, sentences and a table of each phase against the device's limit."""
    for bench in output.benches:
        found = bench.result.roofline
        if found is None:
            continue
        rows = tuple(
            (
                f"{'narrowed' if name == 'candidate' else 'original'}, {phase}",
                _g(one.measured_ms),
                _g(one.bytes_ms),
                _g(one.arithmetic_ms),
                f"{100 * one.share:.0f} %",
                one.binds,
            )
            for name, phases in found.limits.items()
            for phase, one in phases.items()
        )
        columns = (
            "model and phase",
            "measured, ms",
            "bytes alone, ms",
            "arithmetic alone, ms",
            "of the limit",
            "what binds",
        )
        table = Table(f"Roofline of {bench.label}", columns, rows)
        yield bench.label, list(found.sentences()), table


def energy(output: Output) -> Table | None:
    """Joules, or why nobody counted them."""
    found = [
        (f"{bench.label}, {name}", side.energy)
        for bench in output.benches
        for name, side in (
            ("original", bench.result.baseline),
            ("narrowed", bench.result.candidate),
        )
        if side.energy
    ]
    keys = list(dict.fromkeys(key for _, stored in found for key in stored))
    rows = tuple((name, *(_said(stored.get(key)) for key in keys)) for name, stored in found)
    return Table("Energy", ("", *map(_words, keys)), rows) if rows else None


def hashes(output: Output) -> Table:
    """SHA-256 of everything that went in and came out."""
    record = output.record
    rows: list[tuple[str, str]] = []
    source = record.get("source", {}).get("sha256", {})
    rows += [(f"original: {name}", digest) for name, digest in source.items()]
    if digest := (record.get("calibration") or {}).get("sha256"):
        rows.append(("calibration windows", digest))
    if isinstance(record.get("recipe"), str):
        rows.append(("recipe", record["recipe"]))
    for name, artifact in record.get("artifacts", {}).items():
        files = artifact.get("files", {}).items()
        rows += [(f"{name}/{file}", entry["sha256"]) for file, entry in files]
    return Table("SHA-256", ("what", "hash"), tuple(rows))


def settings(output: Output) -> Table:
    """Choices of the narrowing, spelled out."""
    asked = _flat(output.record.get("shrink", {}))
    rows = [(_words(k), _said(v)) for k, v in asked.items() if v is not None and k != "sha256"]
    calibration = output.record.get("calibration", {})
    rows += [(f"calibration {k}", _said(v)) for k, v in calibration.items() if k != "sha256"]
    return Table("Options of the narrowing", ("option", "value"), tuple(rows))


def _parity_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    phases = found["phases"].values()
    limits = found.get("limits", {})

    def worst(key: str, pick: Any) -> float | None:
        known = [phase[key] for phase in phases if phase.get(key) is not None]
        return pick(known) if known else None

    verdict = "passed" if found.get("passed") else "; ".join(found.get("problems", ["failed"]))
    top1 = worst("top1", min)
    return (
        name,
        _held(worst("max_abs", max), limits.get("max_abs")),
        _held(worst("kl", max), limits.get("kl")),
        "" if top1 is None else f"{100 * top1:.1f} %",
        _held(found.get("perplexity_ratio"), limits.get("perplexity_ratio"), ".4g"),
        verdict,
    )


def _held(figure: float | None, limit: float | None, form: str = ".2g") -> str:
    if figure is None:
        return ""
    return format(figure, form) + ("" if limit is None else f" ({limit:.2g})")


def _quality_sentence(found: Mapping[str, Any]) -> str:
    ratio = found["perplexity"] / found["baseline_perplexity"]
    unit = " per token of the original" if found.get("across") else ""
    text = (
        f"On held-out text its perplexity{unit} is {found['perplexity']:.2f} against "
        f"{found['baseline_perplexity']:.2f} of the original ({ratio:.3f}×"
    )
    if error := found.get("log_ratio_error"):
        text += f", 95 % interval {ratio * math.exp(-1.96 * error):.3f} to "
        text += f"{ratio * math.exp(1.96 * error):.3f}"
    text += ")"
    if found.get("kl") is not None:
        text += f", KL divergence {found['kl']:.3f} nats per token"
    if found.get("top1_agreement") is not None:
        text += (
            f", and {100 * found['top1_agreement']:.0f} % of the most likely tokens are the same"
        )
    if other := found.get("other"):
        ratio = other["perplexity"] / other["baseline_perplexity"]
        text += (
            f"; on {summary.other_text(other)} {ratio:.3f}× and {other['kl']:.3f} nats per token"
        )
    return text + "."


def _task_sentence(row: Mapping[str, Any]) -> str:
    """A metric of a task, of every model."""
    told = [
        f"{found['value']:.3f}"
        + ("" if found.get("error") is None else f" ± {found['error']:.3f}")
        + f" ({model})"
        for model, found in row["models"].items()
    ]
    return f"{row['task']}, {row['metric']} over {row['questions']:,} questions: {', '.join(told)}."


def _rounding_sentence(name: str, parity: Mapping[str, Any]) -> str:
    """What rounding to integers costs, which is never nothing."""
    phases = parity.get("phases", {}).values()
    worst = max((phase["kl"] for phase in phases if phase.get("kl") is not None), default=None)
    if worst is None:
        return f"{name} is what torch computes, but for its rounding."
    limit = parity.get("limits", {}).get("kl")
    within = "" if limit is None else f", within the {limit:.2g} that its precision is allowed"
    return (
        f"{name} is torch's model rounded: its predictions are {worst:.2g} nats per token (KL) "
        f"off{within}."
    )


def _definitions() -> tuple[str, ...]:
    return tuple(f"{metric.upper()}:" for metric in METRICS)


def _g(value: float) -> float:
    return float(f"{value:.4g}")


def _flat(stored: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in stored.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _merged(table: Table) -> Table:
    """Columns that nowhere contradict each other are one."""
    kept: list[tuple[list[str], list[Any]]] = []
    for number, name in enumerate(table.columns[1:], 1):
        cells = [row[number] for row in table.rows]
        for names, told in kept:
            if all(a == b or not a or not b for a, b in zip(told, cells, strict=True)):
                names.append(name)
                told[:] = [a or b for a, b in zip(told, cells, strict=True)]
                break
        else:
            kept.append(([name], cells))
    labels = [", ".join(dict.fromkeys(names)) for names, _ in kept]
    columns = (table.columns[0], *(labels if len(labels) > 1 else ["everywhere"]))
    rows = ((row[0], *(told[n] for _, told in kept)) for n, row in enumerate(table.rows))
    return Table(table.caption, columns, tuple(rows))


def commands(output: Output) -> list[str]:
    """What makes the same output and measures it again."""
    out, model = shlex.quote(output.folder.name), shlex.quote(output.original)
    told = [f"pip install dotexport=={output.record.get('dotexport', __version__)}"]
    if output.recipe:
        told.append(f"dotexport run recipe.yaml -o {out}")
    if text := (output.record.get("quality") or {}).get("text"):
        told.append(f"dotexport eval {out} --baseline {model} --text {shlex.quote(text)}")
    for bench in output.benches:
        asked = bench.result.workload
        told.append(
            f"dotexport bench {out} --baseline {model} --target {bench.result.target} "
            f"--precision {bench.result.precision}{_options(bench.result.runtime)} "
            f"--prompt {asked.prompt_length} --generate {asked.generation_length} "
            f"--batch {asked.batch_size} --threads {asked.threads} "
            f"--concurrency {asked.concurrency} --rounds {asked.rounds} "
            f"--min-iterations {asked.min_iterations} --min-seconds {asked.min_seconds:g} "
            f"--warmups {asked.min_warmups} --seed {asked.seed}"
        )
    return told


def _options(runtime: Mapping[str, Any]) -> str:
    """Flags of what was chosen for the runtime. A folder of llama.cpp lies elsewhere elsewhere."""
    flags = {"compiled": "--compile", "llama_cpp": "--llama-cpp PATH"}
    chosen = {name: value for name, value in runtime.items() if value}
    return "".join(f" {flags.get(name, f'--{name} {value}')}" for name, value in chosen.items())


def _said(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(key))} {_said(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 1e4 else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
