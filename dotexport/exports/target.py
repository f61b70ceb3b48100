"""Targets: what an adapter to one runtime must offer, and how one is found by its name.

Shapes: B sequences of a batch, L tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import RuntimeMissingError, UsageError

if TYPE_CHECKING:  # a measuring process needs an adapter, and no torch
    from dotexport.models.checkpoint import Checkpoint

GROUP = "dotexport.targets"

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]

QUANTISED_BLOCK = 32
"""Inputs that share one scale in 4-bit weights: part of what makes a rounding exact."""


class Session(Protocol):
    """One artifact, loaded in its own runtime, with its KV cache.

    One that reads the whole model from disk for every answer has `on_disk`, True: it is asked less.
    """

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        """Prefill: empty the cache, read the prompts, return logits_BLV.

        Prompts shorter than L are padded on the right; `lengths_B` says how long each one is
        (None: all are L). Logits at padded positions mean nothing.
        """
        ...

    def step(self, tokens_B: Tokens) -> Logits:
        """Decode: append one token to every sequence of the cache, return its logits_BV."""
        ...


@dataclass(frozen=True)
class Rehearsal:
    """An artifact on a machine that lacks the device it is for.

    Attributes:
        session: the same graph on another device.
        where: which one, and what is different there; follows "rehearsed".
        problems: what is wrong with the file itself.
    """

    session: Session
    where: str
    problems: tuple[str, ...] = ()


class Target(Protocol):
    """An adapter to one runtime. `export`, `verify` and `bench` use nothing but this.

    One that writes what only another machine may run has two methods more: `lacking()`, what this
    machine lacks to run it, and `rehearse(checkpoint, folder, precision, peak=, threads=)`, a
    `Rehearsal`; `peak` is the largest magnitude among torch's activations. One whose artifacts hold
    a tokenizer of another form than transformers reads has `text(checkpoint, folder)`, what its
    runtime reads there: a `TextSide` of exports/text_parity.py, or None. One that can read its
    files back has `wrong_in_file(checkpoint, folder)`, what in them is not the checkpoint's though
    logits may not show it. One whose rounding to integers can be chosen has `grids(checkpoint,
    precision)`, by tensor the `Grid` of merging/rounding.py, empty where nothing is rounded;
    `values(checkpoint, folder)`, what a file holds for them; takes `rounded`, levels by tensor, in
    `write`, and in `wrong_in_file` the names of those that are held to `values` instead.
    """

    name: str
    summary: str
    """What it is, in one line."""

    precisions: tuple[str, ...]
    """What it can write, the default first."""

    exact_rounding: tuple[str, ...]
    """Those that round weights as `rounded_to_4_bits` of exports/reference.py does; their artifacts
    are held against torch with the same rounding as well. Usually empty."""

    def missing(self) -> list[str]:
        """What has to be installed before this target can write and run; empty: ready."""
        ...

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        """Every reason why this target cannot hold this model; empty: it can."""
        ...

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        """Write the artifact of a stock checkpoint into an empty folder."""
        ...

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        """Load what `write` made, on `threads` CPU threads (None: the runtime's own choice).

        Raises:
            RuntimeMissingError: the runtime is not installed, or its provider fell back.
        """
        ...


def lacking(target: Target) -> list[str]:
    """What this machine lacks to run what the target writes; empty: nothing."""
    ask = getattr(target, "lacking", None)
    found: list[str] = ask() if ask else []
    return found


@dataclass(frozen=True)
class TargetRow:
    """One line of `dotexport targets`; `missing` keeps it from writing, `lacking` from running."""

    name: str
    precisions: tuple[str, ...]
    missing: tuple[str, ...]
    summary: str
    lacking: tuple[str, ...] = ()


def target_names() -> list[str]:
    """Names of all targets: the built-in ones, then those of installed packages."""
    return list(_known())


def find_target(name: str) -> Target:
    """Import the one adapter of this name and make it.

    Raises:
        UsageError: no target has this name.
        RuntimeMissingError: its file cannot be imported here.
    """
    known = _known()
    if name not in known:
        raise UsageError(f"no target is called {name!r}; known targets: {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    try:
        target: Target = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        raise RuntimeMissingError(
            f"target {name} cannot be used here: {error}; {_how_to_install(name)}"
        ) from error
    return target


def _how_to_install(name: str) -> str:
    """The extra of a target has its name."""
    try:
        extras = metadata("dotexport").get_all("Provides-Extra") or []
    except PackageNotFoundError:  # a checkout that was never installed
        extras = []
    return f"pip install 'dotexport[{name}]'" if name in extras else "install what it needs"


def parse_spec(spec: str) -> tuple[str, str | None]:
    """Split what `--target` takes.

    >>> parse_spec("ort-cpu:int4"), parse_spec("hf")
    (('ort-cpu', 'int4'), ('hf', None))
    """
    found = re.fullmatch(r"([^:\s]+)(?::([^:\s]+))?", spec)
    if found is None:
        raise UsageError(
            f"target {spec!r} cannot be read; expected NAME or NAME:PRECISION, such as ort-cpu:int4"
        )
    return found[1], found[2]


def resolve(spec: str) -> tuple[Target, str]:
    """The target of a spec and the precision to write, its default where the spec names none.

    Raises:
        UsageError: unknown target, or a precision that it cannot write.
    """
    name, precision = parse_spec(spec)
    target = find_target(name)
    if precision is not None and precision not in target.precisions:
        raise UsageError(
            f"target {name} cannot write {precision!r}; it writes {', '.join(target.precisions)}"
        )
    return target, precision or target.precisions[0]


def resolve_for_plan(spec: str) -> tuple[Any, str]:
    """As `resolve`; also a runtime that reads what another target writes, as vLLM reads hf/.

    Of these a plan knows `name` and `config_problems` alone.
    """
    readers: dict[str, str] = importlib.import_module("dotexport.targets").READERS
    if spec not in readers:
        return resolve(spec)
    module, _, attribute = readers[spec].partition(":")
    return getattr(importlib.import_module(module), attribute)(), "as-stored"


def list_targets() -> list[TargetRow]:
    """What `dotexport targets` shows; one that cannot be imported is listed with the reason."""
    return [_row(name) for name in target_names()]


def _row(name: str) -> TargetRow:
    try:
        target = find_target(name)
    except RuntimeMissingError as error:
        return TargetRow(name, (), (str(error),), "")
    missing = tuple(target.missing())
    absent = () if missing else tuple(lacking(target))
    return TargetRow(name, target.precisions, missing, target.summary, absent)


def _known() -> dict[str, str]:
    """Name -> "module:Class". A built-in name cannot be taken over by another package."""
    built_in: dict[str, str] = importlib.import_module("dotexport.targets").BUILT_IN
    others = {point.name: point.value for point in entry_points(group=GROUP)}
    return built_in | {name: value for name, value in others.items() if name not in built_in}
