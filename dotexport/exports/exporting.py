"""The export verb: write artifacts of a stock checkpoint, each kept only if it proves exact.

What a target is stands in target.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotexport.errors import ParityError, SizeError, UsageError
from dotexport.exports.parity import Parity
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import Target, find_target, resolve
from dotexport.exports.verifying import (
    REPORT,
    STOCK,
    check,
    require,
    require_device,
    require_runtime,
    with_text,
    write_report,
)
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.models.origin import describe_source
from dotexport.storage import manifest
from dotexport.storage.output import check_free, new_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """What one target wrote: `files` maps names below `folder` to bytes and SHA-256."""

    target: str
    precision: str
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    parity: Parity | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


@dataclass(frozen=True)
class Request:
    """One artifact that was asked for."""

    target: Target
    precision: str

    @property
    def name(self) -> str:
        """Of its folder below OUT; the stock checkpoint has only one form."""
        name = self.target.name
        return name if name == STOCK else f"{name}-{self.precision}"


def export(
    model: Path,
    specs: Sequence[str],
    *,
    out: Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> list[Artifact]:
    """Write one artifact per spec (NAME or NAME:PRECISION) and hold each against torch.

    An output of dotexport takes its artifacts into itself; a plain model folder needs `out`, which
    becomes such an output with a copy of the checkpoint in hf/.

    Raises:
        RuntimeMissingError: a target's runtime is not installed; or, with `verify`, its device is
            not here, so that nothing could be proven.
        SizeError: targets that cannot hold this model, with every reason of each.
        ParityError: artifacts that do not compute what torch computes; they are not kept.
    """
    requests = list({r.name: r for r in (Request(*resolve(spec)) for spec in specs)}.values())
    home = _output_of(model)
    _check_home(model, home, out)
    _check_targets(requests, Checkpoint.open(home / STOCK if home else model), verify=verify)
    if home is None:
        assert out is not None  # _check_home saw to it
        home = _start_output(model, out, overwrite=overwrite)
    for request in requests:
        if request.name != STOCK:
            check_free(home / request.name, overwrite=_may_replace(home, request, overwrite))
    exporting = _Exporting(
        source=Checkpoint.open(model if _output_of(model) is None else home / STOCK),
        checkpoint=Checkpoint.open(home / STOCK),
        home=home,
        reference=_reference(home, requests) if verify else None,
        overwrite=overwrite,
    )
    return exporting.run(requests)


def _output_of(model: Path) -> Path | None:
    """The output folder that this is, or whose hf/ this is; None: a plain model folder."""
    inside = model.resolve()
    parents = (inside, inside.parent) if inside.name == STOCK else (inside,)
    return next((folder for folder in parents if manifest.is_output(folder)), None)


def _may_replace(home: Path, request: Request, overwrite: bool) -> bool:
    # What the manifest does not know was left by a run that ended between the two.
    return overwrite or request.name not in manifest.read(home).get("artifacts", {})


def _check_home(model: Path, home: Path | None, out: Path | None) -> None:
    if home is not None and out is not None and out.resolve() != home:
        raise UsageError(
            f"{model} is an output of dotexport, which takes its artifacts into itself; "
            "leave the output folder (-o) away"
        )
    if home is None:
        read_config(model)  # refuses what is no model either
    if home is None and out is None:
        raise UsageError(
            f"{model} is a plain model folder, and nothing is written into it; "
            "give an output folder with -o"
        )


def _check_targets(requests: Sequence[Request], checkpoint: Checkpoint, *, verify: bool) -> None:
    for request in requests:
        require_runtime(request.target)
        if verify:
            require_device(request.target)
    problems = [
        f"  {request.name}: {problem}"
        for request in requests
        for problem in request.target.problems(checkpoint, request.precision)
    ]
    if problems:
        raise SizeError(f"{checkpoint.folder} cannot be exported:\n" + "\n".join(problems))


def _start_output(model: Path, out: Path, *, overwrite: bool) -> Path:
    source = Checkpoint.open(model)
    with new_folder(out, overwrite=overwrite) as partial:
        (partial / STOCK).mkdir()
        find_target(STOCK).write(source, partial / STOCK, "as-stored")
        manifest.update(partial, source=describe_source(source))
    return out.resolve()


def _reference(home: Path, requests: Sequence[Request]) -> Reference:
    rounded = any(request.precision.startswith("int") for request in requests)
    return compute_reference(Checkpoint.open(home / STOCK), rounded=rounded)


@dataclass(frozen=True, kw_only=True)
class _Exporting:
    """Everything that the artifacts of one call share.

    Attributes:
        source: what was handed over, whose text side every artifact must have.
        checkpoint: the stock checkpoint of the output, which the others are written from.
    """

    source: Checkpoint
    checkpoint: Checkpoint
    home: Path
    reference: Reference | None
    overwrite: bool

    def run(self, requests: Sequence[Request]) -> list[Artifact]:
        artifacts, failed = [], []
        for request in requests:
            try:
                artifact = self.write(request)
            except _NotExactError as error:
                failed.append(error.parity)
                continue
            artifacts.append(artifact)
            _record(self.home, artifact)
            logger.info("wrote %s: %d bytes", artifact.name, artifact.num_bytes)
        require(failed, note=f" (an artifact that fails is removed; figures: {self.home / REPORT})")
        return artifacts

    def write(self, request: Request) -> Artifact:
        if request.name == STOCK:
            return self.prove(request, self.home / STOCK)  # every output holds it already
        overwrite = _may_replace(self.home, request, self.overwrite)
        with new_folder(self.home / request.name, overwrite=overwrite) as partial:
            request.target.write(self.checkpoint, partial, request.precision)
            return self.prove(request, partial)

    def prove(self, request: Request, folder: Path) -> Artifact:
        """Hold what lies in `folder` against torch before it gets its name."""
        target, precision = request.target, request.precision
        parity = None
        if self.reference is not None:
            parity = check(target, precision, folder, self.reference, artifact=request.name)
            parity = with_text(parity, target, folder, self.source)
            write_report(self.home, [parity], self.reference)
            if not parity.passed:
                raise _NotExactError(parity)
        files = manifest.hash_files(folder)
        return Artifact(target.name, precision, self.home / request.name, files, parity)


class _NotExactError(ParityError):
    """Carries the figures of a failed artifact out of its folder, which is then removed."""

    def __init__(self, parity: Parity) -> None:
        super().__init__(parity.artifact)
        self.parity = parity


def _record(home: Path, artifact: Artifact) -> None:
    entry = {
        "target": artifact.target,
        "precision": artifact.precision,
        "bytes": artifact.num_bytes,
        "files": artifact.files,
        "parity": artifact.parity.as_dict() if artifact.parity else None,
    }
    artifacts = manifest.read(home).get("artifacts", {})
    manifest.update(home, artifacts={**artifacts, artifact.name: entry})
