"""What torch computes of an output, kept beside it where that took long: every verb that holds an
artifact against torch asks for the same.

It is taken only where nothing that decides it has changed: the files of OUT/hf, the code that
computes it, the libraries below it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dotexport.exports.noise import Noise
from dotexport.exports.reference import PRECISIONS, LongText, Reference, compute_reference
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage import manifest
from dotexport.storage.files import hidden

logger = logging.getLogger(__name__)

FILE = Path("reports") / "reference.safetensors"
WORTH = 60.0  # seconds of computing, from which on it is kept
ROOMS = ("exports", "models")  # whose code decides it
LIBRARIES = ("torch", "transformers", "numpy")
PARTS = ("sequences", "logits", "rounded", "rounded_twice")
FAR = ("tokens", "logits", "rounded", "rounded_twice")


def reference_of(
    out: Path, *, rounded: bool = True, precisions: Iterable[str] = PRECISIONS
) -> Reference:
    """`compute_reference` of OUT/hf, or what it gave before.

    Args:
        rounded, precisions: as there; what is kept may hold more.
    """
    checkpoint, asked = Checkpoint.open(out / "hf"), set(precisions)
    key = _key(checkpoint)
    if kept := _read(out / FILE, key):
        reference, of_rounding, of_precisions = kept
        if asked <= of_precisions and (of_rounding or not rounded):
            logger.info("torch's logits are those of an earlier call: %s", out / FILE)
            return reference if rounded else _without_rounding(reference)
        rounded, asked = rounded or of_rounding, asked | of_precisions
    started = time.perf_counter()
    reference = compute_reference(checkpoint, rounded=rounded, precisions=asked)
    if time.perf_counter() - started >= WORTH:
        _write(out / FILE, reference, key, rounded=rounded, precisions=asked)
    return reference


def _key(checkpoint: Checkpoint) -> str:
    """Of all that decides it."""
    code = [Path(__file__).parents[1] / room for room in ROOMS]
    said = {
        "files": manifest.hash_files(checkpoint.folder),
        "code": [manifest.sha256(file) for room in code for file in sorted(room.rglob("*.py"))],
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _without_rounding(reference: Reference) -> Reference:
    long = reference.long
    return replace(
        reference,
        rounded=(),
        rounded_twice=(),
        long=long and replace(long, rounded=None, rounded_twice=None),
    )


def _write(
    file: Path, reference: Reference, key: str, *, rounded: bool, precisions: Collection[str]
) -> None:
    arrays = {
        f"{part}.{number}": np.ascontiguousarray(array)
        for part in PARTS
        for number, array in enumerate(getattr(reference, part))
    }
    long = reference.long
    if long is not None:
        far = {part: getattr(long, part) for part in FAR}
        arrays |= {f"long.{p}": np.ascontiguousarray(a) for p, a in far.items() if a is not None}
    said = {
        "key": key,
        "rounded": rounded,
        "precisions": sorted(precisions),
        "prompt_lengths": reference.prompt_lengths,
        "is_text": reference.is_text,
        "peak": reference.peak,
        "noise": {name: asdict(noise) for name, noise in reference.noise.items()},
        "long": long and {"positions": long.positions, "context": long.context},
    }
    partial = hidden(file, "partial")
    try:
        file.parent.mkdir(exist_ok=True)
        save_file(arrays, partial, {"reference": json.dumps(said)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:  # it is a help, and no result
        logger.warning("torch's logits are not kept for the next call (%s)", error)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, key: str) -> tuple[Reference, bool, set[str]] | None:
    """What is kept by this key, whether of rounding too, and of which precisions."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as kept:
            said: Mapping[str, Any] = json.loads((kept.metadata() or {})["reference"])
            if said["key"] != key:
                return None
            arrays = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError):  # damaged: it is computed again
        return None
    parts = {part: _numbered(arrays, part) for part in PARTS}
    long = None
    if said["long"]:
        far = {part: arrays.get(f"long.{part}") for part in FAR}
        place = {"positions": tuple(said["long"]["positions"]), "context": said["long"]["context"]}
        long = LongText(**far, **place)  # type: ignore[arg-type]
    reference = Reference(
        **parts,
        prompt_lengths=tuple(said["prompt_lengths"]),
        is_text=tuple(said["is_text"]),
        peak=said["peak"],
        noise={name: Noise(**noise) for name, noise in said["noise"].items()},
        long=long,
    )
    return reference, said["rounded"], set(said["precisions"])


def _numbered(arrays: Mapping[str, Any], part: str) -> tuple[Any, ...]:
    count = sum(name.startswith(f"{part}.") for name in arrays)
    return tuple(arrays[f"{part}.{number}"] for number in range(count))
