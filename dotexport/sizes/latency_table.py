"""A latency table of one device: what was measured, and what it says of sizes in between.

`dotexport latency` writes one (bench/latency_measuring.py). All times in it are ratios to the
original, which took turns with every size, so what else the machine did falls out.

A decoder's layers are alike and add their sublayers. At one size of the axis that every matrix
has, time is therefore what each other axis alone makes of it, added up, less what they share.
Between
measured sizes kernels may step, so nothing is drawn through them: such a size costs as much as the
dearer of its two neighbours, which is never less than the truth where time grows with size.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from dotexport.axes import AXES
from dotexport.axes.axis import Axis
from dotexport.errors import UsageError
from dotexport.models.shapes import Sizes
from dotexport.storage import manifest
from dotexport.storage.reading import read_json
from dotexport.storage.schema import validated

SCHEMA = "dotexport.latency/1"
METRICS = ("decode", "prefill")
AGAIN = "measure it again with `dotexport latency`"
# What a table depends on besides the device: first letters of a target -> of distributions.
RUNTIMES = {
    "ort": ("onnxruntime",),
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "mlx": ("mlx", "mlx-lm"),
    "litert": ("ai-edge-litert",),
    "gguf": ("gguf", "torch", "transformers"),
    "hf": ("torch", "transformers"),
    "torch": ("torch", "transformers"),
}

Key = tuple[int, ...]
"""Sizes on the axes of a table: first the one that every matrix has, then the others."""


@dataclass(frozen=True)
class Times:
    """Ratios to the original of one metric at one batch size, and how to read between them.

    Attributes:
        measured: at `layers` layers, over the original with as many.
        shallow: size of the first axis -> the same with `shallow_layers` layers and nothing else
            cut, over the same original; empty where all layers were measured.
    """

    whole: Key
    measured: Mapping[Key, float]
    layers: int
    num_layers: int
    shallow: Mapping[int, float]
    shallow_layers: int = 0

    def ratio(self, key: Key) -> float:
        """Time at these sizes over the original's, all layers of both."""
        if key == self.whole:
            return 1.0
        width, *others = key
        uncut = {k[0] for k in self.measured if k[1:] == self.whole[1:]}
        near = _neighbours(uncut & set(self.shallow or uncut), width)
        return max(self._at(w, others) for w in near) / self.deepened()

    def deepened(self) -> float:
        """The original's time with all its layers over that with the measured ones."""
        return self._deep(self.whole[0], 1.0)

    def _at(self, width: int, others: Sequence[int]) -> float:
        uncut = (width, *self.whole[1:])
        shared = self.measured[uncut]
        alone = [_stairs(self._along(uncut, n), size) for n, size in enumerate(others, start=1)]
        return self._deep(width, alone[0] + sum(time - shared for time in alone[1:]))

    def _along(self, uncut: Key, axis: int) -> dict[int, float]:
        """Size of one axis -> time where no other is cut."""
        return {
            key[axis]: time
            for key, time in self.measured.items()
            if (*key[:axis], *key[axis + 1 :]) == (*uncut[:axis], *uncut[axis + 1 :])
        }

    def _deep(self, width: int, time: float) -> float:
        """From the measured depth to the whole one: time is a line in the number of layers."""
        if not self.shallow:
            return time
        few, many = self.shallow_layers, self.layers
        whole = self.measured[(width, *self.whole[1:])]
        line = (many * self.shallow[width] - few * whole) / (many - few)
        fixed = min(max(line, 0.0), self.shallow[width], time)  # embedding, head, and overhead
        return fixed + self.num_layers / many * (time - fixed)


def _neighbours(measured: Iterable[int], size: int) -> set[int]:
    """The measured size itself, or those on both sides of it."""
    known = sorted(set(measured))
    below = [s for s in known if s <= size][-1:]
    above = [s for s in known if s >= size][:1]
    return set(above) if below == above else {*below, *above}


def _stairs(times: Mapping[int, float], size: int) -> float:
    return max(times[near] for near in _neighbours(times, size))


@dataclass(frozen=True)
class LatencyTable:
    """A table as it was stored.

    Attributes:
        file: where it was read from.
        content: all of it (docs/latency.md names the keys).
    """

    file: Path
    content: Mapping[str, Any]

    @classmethod
    def load(cls, file: Path) -> LatencyTable:
        """Read a table.

        Raises:
            UsageError: there is none, or the file is something else.
        """
        if not file.is_file():
            raise UsageError(
                f"{file} is no latency table; make one with `dotexport latency MODEL -o {file}`"
            )
        content = read_json(file, advice=AGAIN, finite=True)
        if content.get("schema") != SCHEMA:
            raise UsageError(
                f"{file} is no latency table: schema is {content.get('schema')!r}, expected "
                f"{SCHEMA!r}; make one with `dotexport latency MODEL -o FILE`"
            )
        from dotexport.sizes.table_schema import Table

        validated(Table, content, str(file), error=UsageError, advice=AGAIN)
        return cls(file, content)

    @property
    def runtime(self) -> str:
        """NAME:PRECISION that was measured."""
        return f"{self.content['target']}:{self.content['precision']}"

    @property
    def batches(self) -> list[int]:
        return [int(batch) for batch in self.content["original"]]

    @property
    def sha256(self) -> str:
        return manifest.sha256(self.file)

    def predicted(self, sizes: Sizes, metric: str, batch: int) -> float:
        """Time at these sizes over the original's, as the table reads it."""
        return self._times[metric, batch].ratio(key_of(sizes))

    def promised(self, sizes: Sizes, metric: str, batch: int) -> float:
        """The same, raised by as much as the worst held-out size was read too low."""
        ratio = self.predicted(sizes, metric, batch)
        nothing_cut = key_of(sizes) == _whole(self.content)
        return ratio if nothing_cut else ratio * (1 + self.margin(metric, batch))

    def margin(self, metric: str, batch: int) -> float:
        """Share by which the worst held-out size took longer than the table says; at least 0."""
        rows = [row for row in self.content["held_out"] if row["batch"] == batch]
        gaps = (row[metric]["measured"] / row[metric]["predicted"] - 1 for row in rows)
        return max([0.0, *map(float, gaps)])

    def original_ms(self, metric: str, batch: int) -> float:
        return float(self.content["original"][str(batch)][f"{metric}_ms"])

    @cached_property
    def _times(self) -> dict[tuple[str, int], Times]:
        return {
            (metric, batch): times_of(self.content, metric, batch)
            for metric in METRICS
            for batch in self.batches
        }

    def check_batch(self, batch: int | None) -> int:
        """The batch size of a budget: the one asked for, or the first that was measured.

        Raises:
            UsageError: it was not measured.
        """
        if batch is None:
            return self.batches[0]
        if batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise UsageError(
                f"{self.file} holds batch {known} and no {batch}; measure it with "
                f"`dotexport latency MODEL --batch {known.replace(' ', '')},{batch}`"
            )
        return batch

    def strangers(self) -> list[str]:
        """What is different here from where the table was measured; empty: it holds here."""
        here = device() | {"libraries": runtime_versions(self.content["target"])}
        there = self.content["device"]
        found = [
            f"{name} is {here[name]!r} here and {there.get(name)!r} in the table"
            for name in here
            if here[name] != there.get(name)
        ]
        if self.content["threads"] > here["usable_cores"]:
            found.append(
                f"the table is of {self.content['threads']} threads and this process may use "
                f"{here['usable_cores']} cores"
            )
        return found

    def require_here(self, *, force: bool = False) -> None:
        """Refuse a table of another device or other releases.

        Raises:
            UsageError: with every difference.
        """
        if (found := self.strangers()) and not force:
            raise UsageError(
                f"{self.file} was not measured here: {'; '.join(found)}. Measure this device with "
                "`dotexport latency`, or insist with --force-latency-table"
            )

    def require_model(self, architecture: str, sizes: Sizes) -> None:
        """Refuse a table of a model with other sizes; nothing can force it.

        Raises:
            UsageError: naming what differs.
        """
        asked, held = describe(architecture, sizes), self.content["model"]
        if wrong := [
            f"{k} {held.get(k)} and not {v}" for k, v in asked.items() if held.get(k) != v
        ]:
            raise UsageError(
                f"{self.file} is of another model: it has {', '.join(wrong)}; measure this one "
                "with `dotexport latency MODEL`"
            )


def times_of(content: Mapping[str, Any], metric: str, batch: int) -> Times:
    """The rows of one metric and batch size."""
    depth = content["layers"]
    rows = [row for row in content["rows"] if row["batch"] == batch]
    whole = _whole(content)
    ratios = {(row["layers"], key_of_row(row)): row[metric]["ratio"] for row in rows}
    measured = {key: ratio for (n, key), ratio in ratios.items() if n == depth["measured"]}
    shallow = {key[0]: ratio for (n, key), ratio in ratios.items() if n == depth["shallow"]}
    return Times(
        whole,
        {whole: 1.0, **measured},
        depth["measured"],
        depth["model"],
        shallow,
        depth["shallow"] or 0,
    )


def table_axes() -> list[Axis]:
    """All axes that are timed, the one that every matrix has first."""
    return sorted((axis for axis in AXES if axis.timed), key=lambda axis: not axis.everywhere)


def key_of(sizes: Sizes) -> Key:
    return tuple(axis.size(sizes) for axis in table_axes())


def key_of_row(row: Mapping[str, int]) -> Key:
    return tuple(row[axis.name] for axis in table_axes())


def sizes_in_row(key: Key) -> dict[str, int]:
    """What `key_of_row` reads."""
    return {axis.name: size for axis, size in zip(table_axes(), key, strict=True)}


def _whole(content: Mapping[str, Any]) -> Key:
    return key_of_row(content["model"])


def describe(architecture: str, sizes: Sizes) -> dict[str, Any]:
    """What a table must have been measured for."""
    others = ("num_attention_heads", "head_dim", "num_layers", "vocab_size")
    return {
        "architecture": architecture,
        **{axis.name: axis.size(sizes) for axis in AXES if axis.timed},
        **{name: getattr(sizes, name) for name in others},
    }


# Devices ----------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """What this machine is, as far as times depend on it."""
    here = manifest.environment()
    return {
        "cpu": here["cpu"],
        "machine": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": here["cores"]["usable"],
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """Names and drivers of NVIDIA devices; empty where none is to be seen."""
    found = shutil.which("nvidia-smi")
    if found is None:
        return []
    query = [found, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def runtime_versions(target: str) -> dict[str, str]:
    """Releases of what runs the artifacts of a target; empty for a target of a third party."""
    stems = next((stems for name, stems in RUNTIMES.items() if target.startswith(name)), ())
    installed: dict[str, str] = manifest.environment()["libraries"]
    return {name: v for name, v in installed.items() if name.startswith(stems)} if stems else {}


# Where tables lie when nobody says --------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dotexport/latency, or ~/.cache/dotexport/latency."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dotexport/latency"


def cache_file(content: Mapping[str, Any]) -> Path:
    """Of a table: its name says runtime, and stands for model, device, threads and releases."""
    names = ("model", "target", "precision", "threads", "device")
    identity = json.dumps({name: content[name] for name in names}, sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_folder() / f"{content['target']}-{content['precision']}-{key}.json"


def cached_tables(architecture: str, sizes: Sizes) -> list[LatencyTable]:
    """Those of this model that hold here."""
    tables = []
    for file in sorted(cache_folder().glob("*.json")):
        table = LatencyTable.load(file)
        same = table.content["model"] == describe(architecture, sizes)
        if same and not table.strangers():
            tables.append(table)
    return tables
