"""A bench report as comparisons, gates and histories read it: two sides with times and figures.

Figures go by the names of the report's JSON (`p90_ttft_ms`, `decode_tok_s`, `peak_rss_bytes`), so
whatever a report holds can be held against a limit. What a report lacks is not there.

Shapes: G groups (one A B B A each), S samples of one model in a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage import manifest
from dotexport.storage.reading import read_json
from dotexport.storage.schema import validated

from .intervals import STATISTICS
from .result import AGAIN, METRICS, SCHEMA, BenchResult, Measurement, options_in_words
from .statistics import Array
from .sweeps import SCHEMA as SWEEP
from .sweeps import swept

OTHER = "other_"  # before the name of a figure on the second text of an evaluation
ON_TEXT = ("perplexity", "kl", "top1_agreement")
EMBEDDED = ("cosine", "recall_at_10", "agreement")
BASELINE = "baseline_"  # before the original's
LABELLED = "labelled_"  # before the name of a figure on rows with answers
ON_ROWS = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match")
QUALITY = (
    *(*ON_TEXT, *(OTHER + name for name in ON_TEXT)),
    *(*EMBEDDED, *(LABELLED + name for name in ON_ROWS)),
)

# Each rate is some number of tokens or requests over a time, which carries its uncertainty.
RATES = {
    "prefill_tok_s": "p50_ttft_ms",
    "decode_tok_s": "p50_tpot_ms",
    "request_throughput": "mean_e2el_ms",
    "output_throughput": "mean_e2el_ms",
    "total_token_throughput": "mean_e2el_ms",
    "sentences_per_second": "p50_call_ms",
}
# How long and how carefully was measured, which changes no figure's meaning.
EFFORT = {"rounds", "min_iterations", "min_seconds", "min_warmups", "max_warmup_seconds", "seed"}
HARDWARE = ("cpu", "gpu", "gpus", "driver", "gpu_driver", "cuda")
LIBRARIES = {
    "ort": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda"),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "hf": ("torch", "transformers"),
    "torch": ("torch", "transformers", "diffusers"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "mlx": ("mlx", "mlx-lm"),
    "gguf": ("gguf", "torch", "transformers"),  # llama.cpp says its build as a provider
    "vllm": ("vllm",),
}


@dataclass(frozen=True)
class Side:
    """One model of a report.

    Attributes:
        times: milliseconds by group and sample, by metric: `ttft`, `itl`, ...
        figures: every number of the report by its name there.
        rounds: of fresh processes that the groups are of, equally many of each.
    """

    name: str
    source: str
    times: Mapping[str, Array]
    figures: Mapping[str, float]
    rounds: int = 1

    def sampled(self, figure: str) -> tuple[Array, str] | None:
        """Times and statistic that a figure follows from; None if it was not sampled."""
        statistic, _, metric = RATES.get(figure, figure).removesuffix("_ms").partition("_")
        if statistic in STATISTICS and metric in self.times:
            return self.times[metric], statistic
        return None


@dataclass(frozen=True)
class Report:
    """Two models under one workload, and the conditions that another report must share.

    Attributes:
        file: where it was read.
        label: target, precision and batch.
        conditions: device, runtime and workload, by name; comparable if equal.
        quality: of `dotexport eval`, where it was given or lies in the same output.
    """

    file: Path
    label: str
    conditions: Mapping[str, Any]
    candidate: Side
    baseline: Side
    seed: int = 0
    quality: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        """Figures that both sides have."""
        return set(self.candidate.figures) & set(self.baseline.figures)


def read_reports(file: Path, quality: Path | None = None) -> list[Report]:
    """The report of a file, or all of a sweep.

    Args:
        quality: output folder, or JSON of `dotexport eval`; None: the output that holds `file`.

    Raises:
        UsageError: no such file, or no report that can be compared.
        CheckpointError: not JSON.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder; give one report{_reports_in(file)}")
    if not file.is_file():
        raise UsageError(f"{file} is not there; expected a report of `dotexport bench`")
    stored = read_json(file, advice="measure again with `dotexport bench`", finite=True)
    judged = quality_of(file, quality)
    documents = swept(stored, str(file)) if stored.get("schema") == SWEEP else [stored]
    try:
        return [_read(file, document, judged) for document in documents]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: {type(error).__name__}: {error}; {AGAIN}") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What two sets of conditions differ in, in words."""
    names = chain(ours, (name for name in theirs if name not in ours))
    return [
        f"{name}: {said(theirs.get(name))} against {said(ours.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def said(value: Any) -> str:
    """A condition in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return "not recorded" if value is None else str(value)


def _read(file: Path, stored: dict[str, Any], quality: Mapping[str, Any]) -> Report:
    if stored.get("schema") == SCHEMA:
        return of_result(BenchResult.from_dict(stored, str(file)), file, quality, stored)
    if "schema" not in stored and {"step", "whole", "bytes"} <= stored.keys():
        return _of_pipelines(file, stored)
    if "schema" not in stored and {"call", "seqlen", "bytes"} <= stored.keys():
        return _of_encoders(file, stored, quality)
    if {"kl", "perplexity"} <= stored.keys():
        raise UsageError(f"{file} is the JSON of an evaluation; give it with --quality")
    raise UsageError(
        f"{file} is no bench report: schema is {stored.get('schema')!r}, expected {SCHEMA!r} or "
        f"{SWEEP!r}"
    )


def of_result(
    result: BenchResult,
    file: Path,
    quality: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a bench that was read or just made."""
    known = stored or {}
    return Report(
        file=file,
        label=_label(result),
        conditions=_conditions(result),
        candidate=_side(result.candidate, result, known.get("candidate", {})),
        baseline=_side(result.baseline, result, known.get("baseline", {})),
        seed=result.workload.seed,
        quality=quality or {},
    )


def _label(result: BenchResult) -> str:
    asked = result.workload
    at_once = f" of {asked.concurrency} at once" if asked.concurrency > 1 else ""
    return (
        f"{result.target} {result.precision}, {asked.prompt_length}+{asked.generation_length} "
        f"tokens, batch {asked.batch_size}{at_once}, {asked.threads} threads"
    )


def _side(measured: Measurement, result: BenchResult, stored: Mapping[str, Any]) -> Side:
    computed = {**stored, **measured.as_dict(result.workload)}
    return Side(
        name=measured.name,
        source=measured.source,
        times={metric: _by_group(measured, metric) for metric in METRICS},
        figures=dict(_numbers(computed)),
        rounds=len({sample.round for sample in measured.samples}),
    )


def _by_group(measured: Measurement, metric: str) -> Array:
    """G groups of S times; what one group has more than another is left out."""
    groups: dict[int, list[float]] = {}
    for sample in measured.samples:
        found = sample.itl_ms if metric == "itl" else (getattr(sample, f"{metric}_ms"),)
        groups.setdefault(sample.group, []).extend(found)
    least = min(map(len, groups.values()))
    return np.array([groups[number][:least] for number in sorted(groups)])


def _numbers(stored: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number, those of a nested section under its name: energy_joules."""
    for key, value in stored.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}_")
        elif _is_number(value):
            yield f"{prefix}{key}", float(value)


def _is_number(value: Any) -> bool:
    counts = isinstance(value, int | float) and not isinstance(value, bool)
    return counts and math.isfinite(value)


def _conditions(result: BenchResult) -> dict[str, Any]:
    asked = result.workload.as_dict()
    return {
        "target": result.target,
        "precision": result.precision,
        **({"options": options_in_words(result.runtime)} if result.runtime else {}),
        **_of_machine(result.environment, result.target),
        "providers": list(result.candidate.providers),
        **{name: value for name, value in asked.items() if name not in EFFORT},
    }


def _of_machine(machine: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The device, and the libraries that the runtime stands on."""
    libraries = machine.get("libraries", {})
    family = next((name for name in LIBRARIES if target.startswith(name)), None)
    named = LIBRARIES.get(family or "", [name for name in libraries if name != "dotexport"])
    return {
        **{name: machine[name] for name in HARDWARE if machine.get(name)},
        "cores": machine.get("cores", {}).get("usable"),
        **_limited(machine),
        "runtime": {name: libraries[name] for name in named if name in libraries},
    }


def _limited(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Processors' worth of time that a container grants, where it is fewer than there are."""
    granted = (machine.get("container") or {}).get("cpus")
    return {} if granted is None else {"container cpus": granted}


def _of_pipelines(file: Path, stored: Mapping[str, Any]) -> Report:
    """The bench of a diffusion pipeline; it does not say on which device it was taken."""
    baseline, candidate = _timed_sides(stored, "step", "whole")
    asked = {name: stored[name] for name in ("target", "threads", "batch", "steps")}
    unknown = {"cpu": f"not recorded in {file}"}  # so that it equals that of no other file
    label = f"{stored['target']}, batch {stored['batch']}"
    return Report(file, label, asked | unknown, candidate, baseline)


def _of_encoders(file: Path, stored: Mapping[str, Any], quality: Mapping[str, Any]) -> Report:
    """The bench of a text encoder: one call on a batch of sentences."""
    sides = []
    for number, side in enumerate(_timed_sides(stored, "call")):
        rate = {"sentences_per_second": float(stored["sentences_per_second"][number])}
        sides.append(replace(side, figures={**side.figures, **rate}))
    asked = {name: stored[name] for name in ("target", "threads", "batch", "seqlen")}
    label = f"{stored['target']}, {stored['batch']} x {stored['seqlen']} tokens"
    conditions = asked | _of_machine(stored["environment"], stored["target"])
    return Report(file, label, conditions, sides[1], sides[0], quality=quality)


def _timed_sides(stored: Mapping[str, Any], *metrics: str) -> tuple[Side, Side]:
    """Baseline and candidate of a bench that timed calls in turns."""
    sides = []
    for number, name in enumerate(("baseline", "candidate")):
        times = {metric: np.array(stored[metric]["samples_ms"][number]) for metric in metrics}
        figures = {
            f"{statistic}_{metric}_ms": float(compute(times_GS))
            for metric, times_GS in times.items()
            for statistic, compute in STATISTICS.items()
        }
        figures["artifact_bytes"] = float(stored["bytes"][number])
        sides.append(Side(name, "", times, figures))
    return sides[0], sides[1]


def quality_of(file: Path, given: Path | None) -> Mapping[str, Any]:
    """The evaluation that was given, or that of the output which holds a report; {} is none."""
    found = _evaluation(file, given)
    parts = {OTHER: found.get("other") or {}}
    right = found.get("labelled") or {}
    for before, side in ((LABELLED, "narrowed"), (BASELINE + LABELLED, "original")):
        parts[before] = right.get(side) or {}
    return {**found, **{part + name: x for part in parts for name, x in parts[part].items()}}


def _evaluation(file: Path, given: Path | None) -> Mapping[str, Any]:
    if given is None:
        home = file.resolve().parent.parent
        return manifest.read(home).get("quality") or {} if manifest.is_output(home) else {}
    if given.is_dir():
        found = manifest.read(given).get("quality")
        if not found:
            raise UsageError(f"{given} was not evaluated; run `dotexport eval {given}` first")
        return dict(found)
    if not given.is_file():
        raise UsageError(f"{given} is not there; expected an output, or the JSON of an evaluation")
    found = read_json(given, advice="evaluate again with `dotexport eval --json`", finite=True)
    found = found.get("quality", found)
    expected = "expected the JSON of `dotexport eval`"
    known = {"perplexity", *EMBEDDED}  # of decoders; of encoders, which have either
    if not isinstance(found, Mapping) or not known & found.keys():
        raise UsageError(f"{given} has no perplexity; {expected}")
    figures = {name: found[name] for name in QUALITY if found.get(name) is not None}
    validated(dict[str, float], figures, str(given), error=UsageError, advice=expected)
    return found


def _reports_in(folder: Path) -> str:
    found = [str(file) for file in sorted(folder.glob("reports/bench*.json"))]
    return f" of it: {', '.join(found)}" if found else "; it has no reports/bench*.json"
