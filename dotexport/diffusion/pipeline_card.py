"""The model card of a pruned pipeline, written anew whenever a verb adds to the manifest."""

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
    """Label, dense, pruned, change: for the card and for the terminal."""
    if "sizes" in record:  # a plain pipeline that was only exported has one size
        before, after = record["sizes"]["parameters"]
        yield "parameters of the denoiser", f"{before:,}", f"{after:,}", f"{after / before:.3f}x"
    for label, dense, pruned, digits in _quality(record.get("quality", {})):
        change = f"{pruned / dense:.3f}x" if dense else ""
        yield label, f"{dense:.{digits}f}", f"{pruned:.{digits}f}", change
    yield from timed_rows(record)


def _quality(quality: Mapping[str, Any]) -> Iterator[tuple[str, float, float, int]]:
    if not quality:
        return
    yield "held-out denoising loss", quality["dense_loss"], quality["loss"], 4
    yield "deviation of samples at the same noise", 0.0, quality["deviation"], 4
    if quality.get("frechet") is not None:
        label = f"Frechet distance ({quality['features']}; not monotone)"
        yield label, quality["dense_frechet"] or 0.0, quality["frechet"], 3


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    source, denoiser, shrink = record["source"], record["denoiser"], record["shrink"]
    yield front_matter(
        library_name="diffusers",
        base_model=source["model"],
        license=source["licence"],
        tags=["dotexport", "pruned"],
    )
    yield ""
    yield f"# {plain(source['model'])}, pruned by dotexport"
    yield ""
    yield from _loading(denoiser)
    yield ""
    yield "| | original | pruned | change |"
    yield "|---|---:|---:|---|"
    for row in rows(record):
        yield f"| {' | '.join(map(plain, row))} |"
    yield ""
    yield "## How it was made"
    yield ""
    what = f"zeros ({shrink['sparsity']})" if shrink["sparsity"] else "heads and neurons removed"
    yield (
        f"{what} by `{shrink['prune']['method']}` in {shrink['prune']['packages']} packages, "
        f"calibrated on {record['calibration']['prompts']} prompts of "
        f"{shrink['sampling']['steps']} steps, seed {shrink['sampling']['seed']}; dotexport "
        f"{record['dotexport']}. `dotexport.json` has every figure."
    )
    if shrink["sparsity"]:
        yield ""
        yield "Zeros save neither time nor bytes where no kernel is made for them."
    yield ""
    yield "## Licence"
    yield ""
    yield f"That of the original{': ' + plain(source['licence']) if source['licence'] else ''}."


def _loading(denoiser: Mapping[str, Any]) -> Iterator[str]:
    if not denoiser["class"].startswith("Pruned"):
        yield "A pipeline of stock classes: `DiffusionPipeline.from_pretrained` loads `pipeline/`."
        return
    name, component = denoiser["class"], denoiser["component"]
    yield (
        f"The denoiser is a `{name}`: layers have widths of their own. With dotexport installed, "
        "`DiffusionPipeline.from_pretrained` loads `pipeline/`; without it, "
        f"`AutoModel.from_pretrained('pipeline/{component}', trust_remote_code=True)` loads the "
        f"denoiser with the file `pipeline/{component}/pruned.py`, which needs diffusers only."
    )
