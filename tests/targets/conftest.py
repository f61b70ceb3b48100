"""Every built-in target in every precision, exported once per model.

DOTEXPORT_TARGETS=onnx,gguf runs the suite for some of them alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dotexport.adapter import Target, find_target, target_names
from dotexport.checkpoint import Checkpoint
from dotexport.errors import RuntimeMissingError
from dotexport.exporting import export
from dotexport.reference import Reference, compute_reference

LLAMA_CPP = "DOTEXPORT_LLAMA_CPP"

Exported = Callable[[str], Path]


def specs() -> list[str]:
    """NAME:PRECISION of all targets whose runtime is installed here.

    Superblocks do not fit the rows of tiny models; test_kquants.py has wider ones for them.
    """
    return [f"{t.name}:{p}" for t in usable_targets() for p in t.precisions if not p.endswith("-k")]


def usable_targets() -> Iterator[Target]:
    chosen = os.environ.get("DOTEXPORT_TARGETS", ",".join(target_names())).split(",")
    for name in filter(chosen.__contains__, target_names()):
        with suppress(RuntimeMissingError):
            target = find_target(name)
            if not target.missing():
                yield target


@pytest.fixture(params=specs())
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def translated_once() -> Iterator[None]:
    """Tracing and translating take most of an export, and are the same for every precision.

    The trace is the same for every target that begins with one, too.
    """
    from dotexport.targets import traced

    with pytest.MonkeyPatch.context() as patch:
        programs = by_folder(traced.trace)
        patch.setattr(traced, "trace", lambda c: programs(c.folder))
        with suppress(ImportError):
            from dotexport.targets import portable

            written = by_folder(portable._translate)
            from_proto, to_proto = portable.ir.serde.from_proto, portable.ir.serde.to_proto
            patch.setattr(portable, "_translate", lambda c: from_proto(to_proto(written(c.folder))))
        with suppress(ImportError):
            from dotexport.targets import intel

            converted = by_folder(intel._translate)
            patch.setattr(intel, "_translate", lambda c: converted(c.folder).clone())
        yield


def by_folder(translate: Callable[[Checkpoint], Any]) -> Callable[[Path], Any]:
    return cache(lambda folder: translate(Checkpoint.open(folder)))


@pytest.fixture(scope="session")
def exported(
    tiny_llama: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    translated_once: None,
) -> Exported:
    """Name of a tiny model -> an output with every artifact of it, not verified."""
    outs: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in outs:
            outs[name] = tmp_path_factory.mktemp(f"out-{name}") / "out"
            export(tiny_llama(name), specs(), out=outs[name], verify=False)
        return outs[name]

    return make


@pytest.fixture(scope="session")
def reference_of(exported: Exported) -> Callable[[str], Reference]:
    """Name of a tiny model -> what torch says."""
    references: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in references:
            references[name] = compute_reference(Checkpoint.open(exported(name) / "hf"))
        return references[name]

    return make


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The library of llama.cpp; the test is skipped where none is named."""
    from dotexport.targets.llamacpp import find_library

    if LLAMA_CPP not in os.environ:
        pytest.skip(f"set {LLAMA_CPP} to a folder of llama.cpp")
    return find_library(Path(os.environ[LLAMA_CPP]))
