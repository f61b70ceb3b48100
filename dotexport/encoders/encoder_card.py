"""The model card of a narrowed encoder, written anew whenever a verb adds to the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dotexport.outputs.markdown import front_matter, plain
from dotexport.outputs.timed_rows import timed_rows
from dotexport.storage import manifest
from dotexport.storage.files import write_text

Row = tuple[str, str, str, str]


def write(out: Path) -> None:
    """Render OUT/README.md."""
    write_text(out / "README.md", "\n".join(_lines(manifest.read(out))) + "\n")


def rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """Label, original, narrowed, change: for the card and for the terminal."""
    for word, (before, after) in record.get("sizes", {}).items():
        yield word.replace("_", " "), f"{before:,}", f"{after:,}", f"{after / before:.3f}x"
    held = record.get("held_out", {})
    for word, label in (
        ("cosine", "cosine of embeddings, held-out calibration text"),
        ("mapped_cosine", "cosine of what a linear map makes of embeddings, held-out text"),
    ):
        if word in held:
            yield label, "1", f"{held[word]:.4f}", ""
    yield from _quality(record.get("quality", {}), "")
    for name, quality in record.get("artifact_quality", {}).items():
        yield from _quality(quality, f", {name}")
    yield from timed_rows(record)


def _quality(quality: Mapping[str, Any], where: str) -> Iterator[Row]:
    for word, value in quality.items():
        if isinstance(value, float):
            yield f"{word.replace('_', ' ')}{where}", "", f"{value:.4f}", ""
    right = quality.get("labelled")
    if right:
        for word, after in right["narrowed"].items():
            before = right["original"][word]
            label = f"{word.replace('_', ' ')} of {right['rows']:,} labelled rows{where}"
            yield label, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    source, options = record["source"], record["shrink"]
    yield front_matter(
        library_name="transformers",
        base_model=source["model"],
        license=source["licence"],
        tags=["dotexport", "pruned"],
    )
    yield ""
    yield f"# {plain(source['model'])}, narrowed by dotexport"
    yield ""
    yield "`hf/` is of the same stock class and loads as the original does."
    if record.get("map_back"):
        yield ""
        yield (
            "Its token vectors are shorter than the original's. A linear layer behind the pooling, "
            "which sentence-transformers reads from modules.json, makes embeddings of them that "
            "can stand beside the original's; readers of token vectors alone do without it."
        )
    yield ""
    yield "| | original | narrowed | change |"
    yield "|---|---:|---:|---|"
    for row in rows(record):
        yield f"| {' | '.join(map(plain, row))} |"
    yield from _artifacts(record["artifacts"])
    yield ""
    yield "## How it was made"
    yield ""
    yield (
        f"method `{options['method']}`, {record['calibration']['sentences']:,} sentences of "
        f"calibration text, {options['heal']} steps of distillation, seed {options['seed']}; "
        f"dotexport {record['dotexport']}. `dotexport.json` has every figure."
    )
    yield ""
    yield "## Licence"
    yield ""
    yield f"That of the original{': ' + plain(source['licence']) if source['licence'] else ''}."


def _artifacts(artifacts: Mapping[str, Any]) -> Iterator[str]:
    """Folders, their bytes, and whether they were held against torch."""
    yield ""
    yield "| folder | MB | differs from torch by |"
    yield "|---|---:|---|"
    for name, entry in artifacts.items():
        parity = entry["parity"]
        if name == "hf":
            told = "it is what torch reads"
        elif parity is None:
            told = "not verified"
        elif parity["passed"]:
            told = f"{parity['difference']:.2g} (limit {parity['limit']:.2g})"
        else:
            told = "**failed**: " + plain("; ".join(parity["problems"]))
        yield f"| `{name}/` | {entry['bytes'] / 1e6:.2f} | {told} |"
