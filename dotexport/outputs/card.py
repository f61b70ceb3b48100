"""The model card OUT/README.md, written anew from the manifest whenever a verb adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotexport.axes import AXES
from dotexport.axes.axis import Axis
from dotexport.outputs import summary
from dotexport.outputs.markdown import Markup, code, front_matter, plain
from dotexport.storage import manifest
from dotexport.storage.files import write_text


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
        finalize=plain,
    )
    environment.filters["code"] = code
    source = record["source"]
    text = environment.get_template("card.md.j2").render(
        front=front_matter(
            library_name="transformers",
            base_model=source["model"],
            license=source["licence"],
            tags=["dotexport", "pruned"],
        ),
        record=record,
        rows=list(summary.rows(record)),
        stories=[(axis.name, Markup(axis.story(record))) for axis in AXES if cut(axis, record)],
        unverified=summary.unverified(record),
        licences=_licences(out),
    )
    write_text(out / "README.md", text)


def cut(axis: Axis, record: Mapping[str, Any]) -> bool:
    """Whether anything of an axis left, by the manifest."""
    before, after = record["sizes"].get(axis.name, (0, 0))
    return bool(after < before)


def _licences(out: Path) -> list[str]:
    found: list[Any] = [*(out / "hf").glob("LICENSE*"), *(out / "hf").glob("NOTICE*")]
    return sorted(file.name for file in found)
