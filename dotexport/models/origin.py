"""Where a model comes from: its name, its licence, and the hashes of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dotexport import embedded
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage import manifest
from dotexport.storage.reading import UnreadableError, parse_yaml, read_json

ORIGIN = "unpacked-from.json"  # of a folder that was unpacked from a file: its name and SHA-256
FRONT_MATTER = 1 << 18  # characters: an index of results may stand in it, and no more


def describe_source(source: Checkpoint) -> dict[str, Any]:
    """What the manifest says about the model that went in; no path of the user's machine.

    Of a GGUF file these are its own name and hash, and the bytes of what it unpacks to.
    """
    return {
        "model": model_name(source.folder),
        "licence": licence(source.folder),
        "bytes": source.num_bytes,
        "sha256": _hashes(source),
    }


def _hashes(source: Checkpoint) -> dict[str, str]:
    file = source.folder / ORIGIN
    if file.is_file():
        said = read_json(file, advice=f"remove {source.folder}, and it is unpacked again")
        return {str(said["file"]): str(said["sha256"])}
    files = sorted({*source.files.values(), source.folder / "config.json"})
    return {file.name: manifest.sha256(file) for file in files}


def model_name(folder: Path) -> str:
    """What people call the model in this folder: a hub id, an output's name, or the folder's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    if folder == embedded.MODEL_DIR.resolve():
        return "dotexport-embedded"
    return folder.parent.name if folder.name == "hf" else folder.name


def licence(folder: Path) -> str | None:
    """The licence that a model card's front matter names, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(FRONT_MATTER)
    if not text.startswith("---\n"):
        return None
    try:
        front = parse_yaml(text[4:].partition("\n---")[0])
    except UnreadableError:
        return None
    named = front.get("license") if isinstance(front, dict) else None
    several = named if isinstance(named, list) else [named]
    return ", ".join(str(one) for one in several if isinstance(one, str)) or None
