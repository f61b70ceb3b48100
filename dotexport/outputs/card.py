"""The model card OUT/README.md, written anew from the manifest whenever a verb adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dotexport.outputs import manifest, summary
from dotexport.outputs.output import write_text


def write(out: Path) -> None:
    """Render the card of an output that was shrunk; a plain export keeps its model's own."""
    record = manifest.read(out)
    if "shrink" not in record:
        return
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dotexport.outputs", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    text = environment.get_template("card.md.j2").render(
        record=record,
        rows=list(summary.rows(record)),
        unverified=summary.unverified(record),
        licences=_licences(out),
    )
    write_text(out / "README.md", text)


def _licences(out: Path) -> list[str]:
    found: list[Any] = [*(out / "hf").glob("LICENSE*"), *(out / "hf").glob("NOTICE*")]
    return sorted(file.name for file in found)
