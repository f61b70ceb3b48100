"""The export verb: write artifacts of a stock checkpoint, each kept only if it proves exact.

What a target is stands in target.py.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dotexport.errors import ParityError, SizeError, UsageError
from dotexport.exports.alone import alone
from dotexport.exports.calibrating import (
    Calibrated,
    Progress,
    Text,
    calibrate,
    grids_of,
    require_grids,
)
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.parity import Parity
from dotexport.exports.reference import Reference
from dotexport.exports.target import Target, find_target, resolve
from dotexport.exports.verifying import (
    REPORT,
    STOCK,
    Chosen,
    artifact_name,
    check,
    require,
    require_device,
    require_runtime,
    with_text,
    write_report,
)
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.models.finding import opened
from dotexport.models.origin import describe_source
from dotexport.storage import manifest
from dotexport.storage.output import check_free, new_folder, occupied
from dotexport.storage.ownership import is_unfinished

logger = logging.getLogger(__name__)

ReadText = Callable[[Checkpoint], Text]


@dataclass(frozen=True)
class Artifact:
    """What one target wrote: `files` maps names below `folder` to bytes and SHA-256.

    Attributes:
        calibration: what weights were rounded for (calibrating.py); None: to nearest, if at all.
    """

    target: str
    precision: str
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    parity: Parity | None = None
    calibration: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "target": self.target,
            "precision": self.precision,
            "bytes": self.num_bytes,
            "files": self.files,
            "parity": self.parity.as_dict() if self.parity else None,
            **({"calibration": self.calibration} if self.calibration else {}),
        }


@dataclass(frozen=True)
class Request:
    """One artifact that was asked for."""

    target: Target
    precision: str

    @property
    def name(self) -> str:
        """Of its folder below OUT."""
        return artifact_name(self.target, self.precision)


def export(
    model: Path,
    specs: Sequence[str],
    *,
    out: Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    read: ReadText | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Artifact]:
    """Write one artifact per spec (NAME or NAME:PRECISION) and hold each against torch.

    An output of dotexport takes its artifacts into itself; a plain model folder, or a GGUF file,
    needs `out`, which becomes such an output with a copy of the checkpoint in hf/.

    Args:
        read: the text that weights are rounded for, of a checkpoint; None: to nearest.

    Raises:
        UsageError: `read`, and a target that has no rounding to choose.
        RuntimeMissingError: a target's runtime is not installed; or, with `verify`, its device is
            not here, so that nothing could be proven.
        SizeError: targets that cannot hold this model, with every reason of each.
        ParityError: artifacts that do not compute what torch computes; they are not kept.
    """
    requests = list({r.name: r for r in (Request(*resolve(spec)) for spec in specs)}.values())
    model = opened(model)
    if output_of(model) is None:
        read_config(model)  # refuses what is no model
    home = home_of(model, out, overwrite=overwrite)
    source = Checkpoint.open(home / STOCK if home else model)
    source.companions()  # refuses links that lead elsewhere
    _check_targets(requests, source, verify=verify)
    if read is not None:
        require_grids([(r.target, r.precision) for r in requests], source)
    rounding = _Rounding(read, progress)
    if home is not None:
        with occupied(home, shared=True):
            made = _exported(requests, source, home, rounding, verify=verify, overwrite=overwrite)
        return made.kept(home)
    assert out is not None  # home_of saw to it
    home = out.expanduser().resolve()
    with new_folder(home, overwrite=overwrite) as partial:
        _start_output(source, partial)
        made = _exported(requests, source, partial, rounding, verify=verify, overwrite=False)
        if not made.artifacts:
            made.kept(None)  # raises: of an output with nothing in it nothing stays
    return made.kept(home)


def _exported(
    requests: Sequence[Request],
    source: Checkpoint,
    home: Path,
    rounding: _Rounding,
    *,
    verify: bool,
    overwrite: bool,
) -> _Made:
    for request in requests:
        if request.name != STOCK:
            check_free(home / request.name, overwrite=_may_replace(home, request, overwrite))
    with alone(Checkpoint.open(home / STOCK)) as checkpoint:
        exporting = _Exporting(
            source=source,
            checkpoint=checkpoint,
            home=home,
            rounded=rounding.of(requests, checkpoint),
            reference=_reference(home, requests) if verify else None,
            overwrite=overwrite,
        )
        return exporting.run(requests)


def output_of(model: Path) -> Path | None:
    """The output folder that this is, or whose hf/ this is; None: a plain model folder."""
    inside = model.resolve()
    parents = (inside, inside.parent) if inside.name == STOCK else (inside,)
    return next((folder for folder in parents if manifest.is_output(folder)), None)


def _may_replace(home: Path, request: Request, overwrite: bool) -> bool:
    return overwrite or is_unfinished(home / request.name)


def home_of(model: Path, out: Path | None, *, overwrite: bool) -> Path | None:
    """The output that takes its artifacts into itself; None: a plain model, whose output is `out`.

    Raises:
        UsageError: no output for a plain model, or another one than the model's own.
    """
    home = output_of(model)
    if home is not None and out is not None and out.resolve() != home:
        raise UsageError(
            f"{model} is an output of dotexport, which takes its artifacts into itself; "
            "leave the output folder (-o) away"
        )
    if home is None and out is None:
        raise UsageError(
            f"{model} is a plain model folder, and nothing is written into it; "
            "give an output folder with -o"
        )
    if home is None and out is not None and not overwrite and manifest.is_output(out):
        raise UsageError(
            f"{out} is an output of dotexport already; to add a target to it, `dotexport export "
            f"{out} --target ...`, or give another output folder"
        )
    return home


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


def _start_output(source: Checkpoint, folder: Path) -> None:
    stock = folder / STOCK
    stock.mkdir()
    find_target(STOCK).write(source, stock, "as-stored")
    manifest.update(folder, source=describe_source(source))
    _record(folder, Artifact(STOCK, "as-stored", stock, manifest.hash_files(stock)))


def _reference(home: Path, requests: Sequence[Request]) -> Reference:
    rounded = any(request.precision.startswith("int") for request in requests)
    precisions = {request.precision for request in requests}
    return reference_of(home, rounded=rounded, precisions=precisions)


@dataclass(frozen=True, kw_only=True)
class _Exporting:
    """Everything that the artifacts of one call share.

    Attributes:
        source: what was handed over, whose text side every artifact must have.
        checkpoint: the stock checkpoint of the output, which the others are written from.
        rounded: by artifact, a rounding that was chosen.
    """

    source: Checkpoint
    checkpoint: Checkpoint
    home: Path
    rounded: Mapping[str, Calibrated]
    reference: Reference | None
    overwrite: bool

    def run(self, requests: Sequence[Request]) -> _Made:
        artifacts, failed = [], []
        for request in requests:
            try:
                artifact = self.write(request)
            except _NotExactError as error:
                failed.append(error.parity)
                continue
            artifacts.append(artifact)
            logger.info("wrote %s: %d bytes", artifact.name, artifact.num_bytes)
        return _Made(artifacts, failed)

    def write(self, request: Request) -> Artifact:
        if request.name == STOCK:  # every output holds it already
            artifact = self.prove(request, self.home / STOCK)
            _record(self.home, artifact)
            return artifact
        folder = self.home / request.name
        with occupied(folder):  # until it is recorded: a lock that is left says it was not
            overwrite = _may_replace(self.home, request, self.overwrite)
            with new_folder(folder, overwrite=overwrite) as partial:
                self.fill(request, partial)
                artifact = self.prove(request, partial)
            try:
                _record(self.home, artifact)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return artifact

    def fill(self, request: Request, folder: Path) -> None:
        asked = self.checkpoint, folder, request.precision
        if (calibrated := self.rounded.get(request.name)) is None:
            request.target.write(*asked)
        else:
            write: Any = request.target.write  # one that has grids takes what was chosen on them
            write(*asked, rounded=calibrated.rounded)

    def prove(self, request: Request, folder: Path) -> Artifact:
        """Hold what lies in `folder` against torch before it gets its name."""
        target, precision = request.target, request.precision
        calibrated, parity = self.rounded.get(request.name), None
        record = None if calibrated is None else calibrated.record
        chosen = Chosen(self.checkpoint, record) if record else None
        if self.reference is not None:
            asked = target, precision, folder, self.reference
            parity = check(*asked, artifact=request.name, chosen=chosen)
            parity = with_text(parity, target, folder, self.source, chosen)
            write_report(self.home, [parity], self.reference)
            if not parity.passed:
                raise _NotExactError(parity)
        files = manifest.hash_files(folder)
        where = self.home / request.name
        return Artifact(target.name, precision, where, files, parity, record)


@dataclass(frozen=True)
class _Rounding:
    """How weights are rounded to integers: for a text, or to nearest."""

    read: ReadText | None
    progress: Progress

    def of(self, requests: Sequence[Request], checkpoint: Checkpoint) -> dict[str, Calibrated]:
        """By artifact; those that it does not name are rounded to nearest."""
        if self.read is None:
            return {}
        grids = [grids_of(r.target, checkpoint, r.precision) for r in requests]
        made = calibrate(checkpoint, self.read(checkpoint), grids, progress=self.progress)
        return {r.name: one for r, one in zip(requests, made, strict=True)}


@dataclass(frozen=True)
class _Made:
    """What came of the requests of one call."""

    artifacts: Sequence[Artifact]
    failed: Sequence[Parity]

    def kept(self, home: Path | None) -> list[Artifact]:
        """The artifacts where they lie now.

        Args:
            home: None where nothing stays.

        Raises:
            ParityError: for those that failed.
        """
        figures = f"; figures: {home / REPORT}" if home else ""
        require(self.failed, note=f" (an artifact that fails is removed{figures})")
        return [replace(a, folder=home / a.name) for a in self.artifacts] if home else []


class _NotExactError(ParityError):
    """Carries the figures of a failed artifact out of its folder, which is then removed."""

    def __init__(self, parity: Parity) -> None:
        super().__init__(parity.artifact)
        self.parity = parity


def _record(home: Path, artifact: Artifact) -> None:
    manifest.merge(home, artifacts={artifact.name: artifact.entry})
