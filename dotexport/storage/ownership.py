"""What of an output dotexport wrote, by its manifest: nothing else is ever replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage import manifest
from dotexport.storage.files import MANIFEST
from dotexport.storage.locking import lock_file

STOCK = "hf"
REPORTS = "reports"
REPORT_KINDS = {".json", ".jsonl", ".html", ".png", ".svg", ".csv"}
OWN = {MANIFEST, "recipe.yaml"}
HIDDEN = re.compile(r"\..+\.(lock|(partial|old)-\w+)")
NOISE = {".DS_Store", "Thumbs.db", "__pycache__"}


def foreign_files(folder: Path) -> list[str]:
    """Names in an output, or in an artifact of one, that are not dotexport's.

    Raises:
        UsageError: the manifest cannot say what is whose.
    """
    home = folder if manifest.is_output(folder) else folder.parent
    try:
        record = manifest.read(home)
    except CheckpointError as error:
        raise UsageError(
            f"{folder} is not replaced, for nobody can say what in it is dotexport's: {error}; "
            "remove it yourself, or give another folder"
        ) from error
    artifacts = record.get("artifacts", {})
    if home == folder:
        return sorted(_in_output(folder, record))
    if is_unfinished(folder):
        return []
    known = artifacts.get(folder.name, {}).get("files", {})
    return sorted(_in_artifact(folder, known))


def is_unfinished(artifact: Path) -> bool:
    """Whether a run that wrote this ended before the manifest knew of it."""
    known = manifest.read(artifact.parent).get("artifacts", {})
    return artifact.name not in known and lock_file(artifact).exists()


def _in_output(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    artifacts = record.get("artifacts", {})
    card = {"README.md"} if "shrink" in record else set()
    for entry in folder.iterdir():
        name = entry.name
        if name in artifacts:
            inner = _in_artifact(entry, artifacts[name]["files"])
            yield from (f"{name}/{file}" for file in inner)
        elif name == REPORTS:
            files = (file for file in entry.rglob("*") if file.is_file())
            yield from (f"{name}/{f.name}" for f in files if f.suffix not in REPORT_KINDS)
        elif name not in OWN | card | NOISE and not HIDDEN.fullmatch(name):
            yield from () if entry.is_dir() and is_unfinished(entry) else (name,)


def _in_artifact(folder: Path, known: Mapping[str, Any]) -> Iterator[str]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if not file.is_dir() and name.as_posix() not in known and not NOISE & set(name.parts):
            yield name.as_posix()
