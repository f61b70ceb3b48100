"""What was made and what it costs and gains: rows for the closing table and the model card."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dotexport.axes import AXES
from dotexport.models.checkpoint import read_config
from dotexport.models.families import find_family
from dotexport.models.text_options import SELF
from dotexport.storage import manifest


class Row(NamedTuple):
    """One line: a figure of the original, of the narrowed model, and how they compare."""

    label: str
    original: str
    narrowed: str
    change: str


def rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """All rows that a manifest holds figures for: size, then quality, then speed."""
    yield from _size(record)
    if quality := record.get("quality"):
        yield from _quality(quality)
    elif held_out := record.get("held_out"):
        yield from _held_out(held_out)
    if latency := record.get("latency"):
        yield _promise(latency)
    for name, measured in record.get("bench", {}).items():
        yield from _speed(name, measured)
    for kind, measured in record.get("served", {}).items():
        yield from _served(kind, measured)


def _size(record: Mapping[str, Any]) -> Iterator[Row]:
    for label in (*(axis.name for axis in AXES), "vocab_size", "parameters"):
        if label in record.get("sizes", {}):
            before, after = record["sizes"][label]
            yield Row(label, f"{before:,}", f"{after:,}", _ratio(after, before))
    source, stock = record.get("source"), record.get("artifacts", {}).get("hf")
    if vocabulary := record.get("vocabulary"):
        yield from _vocabulary(vocabulary)
    if source and stock:
        files = stock["files"].items()
        after = sum(entry["bytes"] for name, entry in files if name.endswith(".safetensors"))
        before = source["bytes"]
        yield Row("weights in hf/, MB", *_megabytes(before, after), _ratio(after, before))


def _vocabulary(vocabulary: Mapping[str, Any]) -> Iterator[Row]:
    """What the smaller vocabulary costs: more tokens for the same text."""
    for text, found in vocabulary.get("proof", {}).items():
        before, after = found["tokens_per_byte"]
        label = f"tokens per byte, {Path(text).name}"
        yield Row(label, f"{before:.4f}", f"{after:.4f}", _ratio(after, before))


def _quality(quality: Mapping[str, Any]) -> Iterator[Row]:
    before, after = quality["baseline_perplexity"], quality["perplexity"]
    change = _ratio(after, before)
    if error := quality.get("log_ratio_error"):  # paired over windows; small, so also relative
        change += f" ± {error * after / before:.3f}"
    across = quality.get("across")
    unit = " (per token of the original)" if across else ""
    yield Row(f"perplexity, held-out text{unit}", f"{before:.3f}", f"{after:.3f}", change)
    if across:
        for name, label in (("bits_per_byte", "bits"), ("tokens_per_byte", "tokens")):
            one, two = across[name]
            change = _ratio(two, one)
            yield Row(f"{label} per byte, held-out text", f"{one:.4f}", f"{two:.4f}", change)
    kept = ", on the tokens that stayed" if across else ""
    yield Row(f"KL to the original, nats/token{kept}", "0", f"{quality['kl']:.4f}", "")
    yield Row("top-1 agreement", "100 %", f"{100 * quality['top1_agreement']:.1f} %", "")
    if other := quality.get("other"):
        yield from _other(other)
    for read in quality.get("bits_per_byte") or ():
        yield from _bits(read)
    if generation := quality.get("generation"):
        yield from _generation(generation)
    for row in quality.get("tasks") or ():
        yield from _task(row)


def _other(found: Mapping[str, Any]) -> Iterator[Row]:
    """A second text, which a model may know less well."""
    what = other_text(found)
    before, after = found["baseline_perplexity"], found["perplexity"]
    yield Row(f"perplexity, {what}", f"{before:.3f}", f"{after:.3f}", _ratio(after, before))
    yield Row(f"KL to the original, {what}", "0", f"{found['kl']:.4f}", "")


def _bits(read: Mapping[str, Any]) -> Iterator[Row]:
    """What models of other vocabularies can be compared in."""
    before = read["models"]["original"]
    text = _text_in_words(read["text"])
    for model, bits in read["models"].items():
        if model != "original":
            where = "" if model == "hf" else f", {model}"
            label = f"bits per byte, {text}{where}"
            yield Row(label, f"{before:.4f}", f"{bits:.4f}", _ratio(bits, before))


def other_text(found: Mapping[str, Any]) -> str:
    """What the second text of an evaluation is, in words."""
    return _text_in_words(found["text"])


def _text_in_words(source: str) -> str:
    return "text of the original's own" if source == SELF else Path(source).name


def _task(row: Mapping[str, Any]) -> Iterator[Row]:
    """A metric of a task, with standard errors; the gap's is over the same questions."""
    before = row["models"]["original"]
    for model, found in row["models"].items():
        if model == "original":
            continue
        where = "" if model == "hf" else f", {model}"
        label = f"{row['task']} {row['metric']}, {row['questions']:,} questions{where}"
        gap = _with_error(found["gap"], found["gap_error"], "+.3f")
        yield Row(
            label,
            _with_error(before["value"], before["error"]),
            _with_error(found["value"], found["error"]),
            gap,
        )


def _with_error(value: float, error: float | None, form: str = ".3f") -> str:
    return format(value, form) + ("" if error is None else f" ± {error:.3f}")


def _generation(generation: Mapping[str, Any]) -> Iterator[Row]:
    """What the models go on with; artifacts besides hf/ by their names."""
    rows = generation["rows"]
    originals = {row["kind"]: row for row in rows if row["model"] == "original"}
    for row in (row for row in rows if row["model"] != "original"):
        before = originals[row["kind"]]
        where = f"{row['kind']}{'' if row['model'] == 'hf' else ', ' + row['model']}"
        for name, label in (("repetition", "4-grams repeated"), ("stopped", "come to an end")):
            one, two = (f"{100 * side[name]:.0f} %" for side in (before, row))
            yield Row(f"continuations ({where}): {label}", one, two, "")
        shares = [f"{100 * share:.0f}" for share in row["agreement"].values()]
        lengths = ", ".join(map(str, row["agreement"]))
        words = (sentence.partition(":")[0] for sentence in row["words"])
        label = f"continuations ({where}): the same for {lengths} tokens"
        yield Row(label, "100 %", f"{', '.join(shares)} %", "; ".join(words))


def _held_out(cost: Mapping[str, Any]) -> Iterator[Row]:
    """What narrowing itself measured, until somebody evaluates on other text."""
    texts = {"": "held-out calibration text", "other_": "text of another kind"}
    for kind, text in texts.items():
        if (kl := cost.get(f"{kind}kl")) is not None:
            ratio = cost[f"{kind}perplexity_ratio"]
            yield Row(f"perplexity, {text}", "", "", f"{ratio:.3f}x")
            yield Row(f"KL to the original, nats/token, {text}", "0", f"{max(kl, 0.0):.4f}", "")


def _speed(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    before, after = measured["baseline"], measured["candidate"]
    for metric, label in (("prefill_tok_s", "prefill tok/s"), ("decode_tok_s", "decode tok/s")):
        times = measured["comparisons"]["ttft" if metric == "prefill_tok_s" else "tpot"]
        yield Row(
            f"{name} {label}",
            f"{before[metric]:,.0f}",
            f"{after[metric]:,.0f}",
            _faster(after[metric] / before[metric], times),
        )
    for metric, label in (("artifact_bytes", "file, MB"), ("peak_rss_bytes", "peak memory, MB")):
        pair = (before[metric], after[metric])
        yield Row(f"{name} {label}", *_megabytes(*pair), _ratio(pair[1], pair[0]))


def _promise(latency: Mapping[str, Any]) -> Row:
    """A budget of time: what was promised, and what was measured again if it was already."""
    what = "prompt" if latency["metric"] == "prefill" else "token"
    batch = f", batch {latency['batch']}" if latency["batch"] > 1 else ""
    label = f"time per {what}, {latency['target']}-{latency['precision']}{batch}, "
    limit, predicted = latency["limit"], latency["predicted"]
    label += f"budget {limit:.2f}x"
    if predicted is not None:
        label += f", promised {predicted:.2f}x"
    if "measured" not in latency:
        return Row(label, "", "", "")
    found = latency["measured"]
    change = f"{found['ratio']:.2f}x ({found['low']:.2f} to {found['high']:.2f}), "
    before, after = (f"{latency[key]:.2f} ms" for key in ("original_ms", "narrowed_ms"))
    return Row(label, before, after, change + latency["verdict"])


def _served(kind: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    """vLLM's own figures: medians of times, with the interval of their ratio over rounds."""
    for metric, found in measured["comparisons"].items():
        before, after = (measured[m][f"p50_{metric}_ms"] for m in ("baseline", "candidate"))
        interval = f"{found['ratio']:.3f}x ({found['low']:.3f} to {found['high']:.3f})"
        label = f"vllm bench {kind} {metric.upper()}, ms"
        yield Row(label, f"{before:.2f}", f"{after:.2f}", interval)


def _faster(ratio: float, times: Mapping[str, Any]) -> str:
    """The ratio of two rates, with the interval of that of the times at equal pace; no gain is said
    in words, and so is a pace that changed between the two."""
    low, high = 1 / times["high"], 1 / times["low"]
    figures = f"{ratio:.2f}x ({low:.2f} to {high:.2f})"
    if not low <= ratio <= high:
        figures = (
            f"{ratio:.2f}x; the machine changed its pace, at equal pace {low:.2f} to {high:.2f}"
        )
    return f"{figures}, no measurable gain" if low <= 1 <= high else figures


def _megabytes(*sizes: int) -> tuple[str, str]:
    before, after = (f"{size / 1e6:.2f}" for size in sizes)
    return before, after


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}x" if before else ""


def _standing(parity: Mapping[str, Any] | None) -> str:
    if parity is None or (parity.get("unverified") and not parity["problems"]):
        return " NOT VERIFIED"
    return "" if parity["passed"] else " FAILED PARITY"


def unverified(record: Mapping[str, Any]) -> list[str]:
    """Artifacts in a manifest that nobody has held against torch where they are meant to run."""
    artifacts = record.get("artifacts", {})
    return [name for name, entry in artifacts.items() if "NOT" in _standing(entry["parity"])]


def paths(out: Path) -> Iterator[tuple[str, Path]]:
    """What lies in an output folder, for the closing lines."""
    for name, artifact in manifest.read(out).get("artifacts", {}).items():
        yield f"artifact {name}{_standing(artifact['parity'])}", out / name
    for label, name in (
        ("report", "reports/report.html"),
        ("figures of every step", "reports"),
        ("model card", "README.md"),
        ("recipe", "recipe.yaml"),
    ):
        if (out / name).exists():
            yield label, out / name


def next_commands(out: Path, model: str, *, multimodal: bool = False) -> Iterator[tuple[str, str]]:
    """What nobody has done yet with an output of shrink, and the command that does it.

    Args:
        multimodal: whether the model has towers beside its language model.
    """
    record, here = manifest.read(out), shlex.quote(str(out))
    artifacts = record.get("artifacts", {})
    if unverified(record):
        yield "prove that hf/ loads and computes", f"dotexport verify {here}"
    if "quality" not in record:
        asked = f"--baseline {shlex.quote(model)} --text FILE"
        yield "quality on text of your own", f"dotexport eval {here} {asked}"
    if set(artifacts) <= {"hf"} and (spec := _runtime_of(read_config(out / "hf"))):
        yield "for a runtime", f"dotexport export {here} --target {spec}"
    stays = (*(axis.name for axis in AXES if axis.everywhere), "vocab_size")
    widths = (record["sizes"].get(name, ()) for name in stays)
    if multimodal and all(len(set(sizes)) <= 1 for sizes in widths):
        asked = f"{here} {shlex.quote(model)} -o WHOLE"
        yield "among the towers of the original", f"dotexport rejoin {asked}"


def _runtime_of(config: Mapping[str, Any]) -> str | None:
    """A target that takes the class: not every one is written by onnxruntime-genai's builder, and
    layers without keys of their own are in no graph."""
    family = find_family(config)
    if not all(family.attends(kind) for kind, _ in family.kinds):
        return None
    unbuilt = family.experts_key or family.architecture == "SmolLM3ForCausalLM"
    if family.architecture == "GptOssForCausalLM":  # windows, which ONNX graphs here have not
        return "executorch"
    return "onnx" if unbuilt else "ort-cpu:int4"
