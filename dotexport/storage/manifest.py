"""The manifest OUT/dotexport.json: where an output comes from, what is in it, what was measured."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dotexport.errors import CheckpointError
from dotexport.storage.files import MANIFEST, write_json
from dotexport.storage.locking import locked
from dotexport.storage.reading import read_json
from dotexport.version import __version__

LIBRARIES = (
    "dotexport",
    "torch",
    "transformers",
    "diffusers",
    "safetensors",
    "numpy",
    "scipy",
    "POT",
    "optimum",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "openvino",
    "executorch",
    "torchao",
    "gguf",
    "mlx",
    "mlx-lm",
    "litert-torch",
    "ai-edge-litert",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "vllm",
)

ADVICE = "export again"


def is_output(folder: Path) -> bool:
    """Whether this folder was written by dotexport."""
    return (folder / MANIFEST).is_file()


def read(out: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        CheckpointError: not an output of dotexport, or a manifest that is damaged or says what
            none of ours does.
    """
    file = out / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{out} is not an output of dotexport: it has no {MANIFEST}; "
            "give the folder that `dotexport shrink -o` or `dotexport export -o` wrote"
        )
    from dotexport.storage import manifest_schema as kinds
    from dotexport.storage.schema import validated

    content = read_json(file, advice=ADVICE, finite=True)
    others: dict[str, type[kinds.Manifest]] = {
        "diffusion": kinds.PipelineManifest,
        "encoder": kinds.EncoderManifest,
    }
    kind = others.get(str(content.get("kind")), kinds.DecoderManifest)
    validated(kind, content, str(file), error=CheckpointError, advice=ADVICE)
    return content


def update(out: Path, **sections: Any) -> None:
    """Replace these top-level sections in one step and keep the others; starts a new manifest.

    Whoever else updates it at the same time comes before or after.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / MANIFEST, wait=True):
        _write(out, sections)


def merge(out: Path, **sections: Mapping[str, Any]) -> None:
    """Add to these sections, or replace in them, one entry by one; otherwise as `update`."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / MANIFEST, wait=True):
        held = read(out) if is_output(out) else {}
        _write(out, {name: {**held.get(name, {}), **part} for name, part in sections.items()})


def _write(out: Path, sections: Mapping[str, Any]) -> None:
    for left in out.glob(f".{MANIFEST}.partial-*"):  # of killed runs: nobody else writes it now
        left.unlink()
    manifest = read(out) if is_output(out) else _fresh()
    write_json(out / MANIFEST, {**manifest, **sections})


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below `folder` (or of those given), by relative name."""
    found = folder.rglob("*") if files is None else files
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(found)
        if file.is_file()
    }


def changed_files(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs from the bytes and hashes that the manifest recorded, or was added since.

    A loader takes some files because they are there: an adapter, a chat template.
    """
    problems = []
    for name, entry in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing; export it again")
        elif file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            problems.append(f"{name} was changed after the export; export it again")
    found = {file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()}
    added = sorted(f.as_posix() for f in found if f.as_posix() not in expected and not _noise(f))
    problems += [f"{name} was added after the export; remove it" for name in added if expected]
    return problems


def require_unchanged(folder: Path) -> None:
    """Refuse an artifact of an output that is not what was verified; others pass.

    Raises:
        CheckpointError: with every file that was changed, added or removed.
    """
    home = folder.resolve().parent
    if not is_output(home):
        return
    entry = read(home).get("artifacts", {}).get(folder.resolve().name)
    if entry and (problems := changed_files(folder, entry["files"])):
        raise CheckpointError(f"{folder} is not what was exported: {'; '.join(problems)}")


def _noise(file: Path) -> bool:
    """What systems and interpreters leave, and no loader reads."""
    return any(part.startswith(".") or part == "__pycache__" for part in file.parts)


def environment() -> dict[str, Any]:
    """What figures depend on: interpreter, machine, library versions. Imports no library."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": {"physical": psutil.cpu_count(logical=False), "usable": _usable_cores()},
        "memory_bytes": psutil.virtual_memory().total,
        "libraries": {name: v for name in LIBRARIES if (v := _version(name)) is not None},
    }


def _fresh() -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"dotexport": __version__, "created": created}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return __version__ if name == "dotexport" else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
