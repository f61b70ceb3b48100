"""The verify verb: every artifact of an output, its bytes and what it computes, against torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dotexport.errors import CheckpointError, ParityError, RuntimeMissingError, UsageError
from dotexport.exports.calibrating import wrong_values
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.parity import Parity, limits_of, measure, rounding_kl
from dotexport.exports.reference import Reference, held_to
from dotexport.exports.target import Rehearsal, Session, Target, find_target, lacking, resolve
from dotexport.exports.text_parity import check_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage import manifest
from dotexport.storage.files import MANIFEST, write_json
from dotexport.storage.reading import read_json
from dotexport.storage.schema import validated

logger = logging.getLogger(__name__)

REPORT = "reports/verify.json"
STOCK = "hf"  # the checkpoint that every output holds, and its target's name


def verify(out: Path, targets: Sequence[str] | None = None) -> list[Parity]:
    """Hold the artifacts of an output against torch; reports/verify.json and the manifest say so.

    `targets` picks some by NAME or NAME:PRECISION; without it, all are verified. A failing
    artifact is in the list like the others: ask `passed`, or call `require`. One whose device is
    not here is rehearsed, and counts as not verified.

    Raises:
        CheckpointError: `out` is not an output of dotexport.
        UsageError: `targets` names something that is not there.
    """
    entries, known = _pick(_listed(out), targets), picked(out, targets)
    needs_rounding = any(precision.startswith("int") for _, precision in known.values())
    checkpoint = Checkpoint.open(out / STOCK)
    precisions = {precision for _, precision in known.values()}
    reference = reference_of(out, rounded=needs_rounding, precisions=precisions)
    parities = []
    for name, entry in entries.items():
        target, precision = known[name]
        asked = (target, precision, out / name, reference)
        chosen = chosen_for(checkpoint, entry)
        if absent := lacking(target):
            parity = rehearse(*asked, checkpoint, absent, artifact=name)
        else:
            parity = check(*asked, artifact=name, chosen=chosen)
        parity = with_text(parity, target, out / name, checkpoint, chosen)
        parities.append(_with_problems(parity, manifest.changed_files(out / name, entry["files"])))
    write_report(out, parities, reference)
    _record(out, parities)
    return parities


def _record(out: Path, parities: Iterable[Parity]) -> None:
    """The manifest says what the last look said: what was spoilt is not good any more."""
    artifacts = manifest.read(out).get("artifacts", {})
    told = {p.artifact: p.as_dict() for p in parities if p.artifact in artifacts}
    manifest.merge(out, artifacts={n: artifacts[n] | {"parity": p} for n, p in told.items()})


@dataclass(frozen=True)
class Chosen:
    """A rounding that is not to the nearest level: of which weights, and what is told of it."""

    checkpoint: Checkpoint
    record: Mapping[str, Any]


def chosen_for(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> Chosen | None:
    """As an artifact's entry in the manifest says; None: rounded to nearest, or not at all."""
    record = entry.get("calibration")
    return None if record is None else Chosen(checkpoint, record)


def check(
    target: Target,
    precision: str,
    folder: Path,
    reference: Reference,
    *,
    artifact: str,
    threads: int | None = None,
    chosen: Chosen | None = None,
) -> Parity:
    """Load one artifact and measure it; one that cannot be run has failed."""
    require_runtime(target)

    def look() -> Parity:
        session = target.open(folder, threads=threads)
        held = reference
        if chosen is not None and precision in target.exact_rounding:
            ask: Any = target
            values = dict(ask.values(chosen.checkpoint, folder))
            held = held_to(reference, chosen.checkpoint, values)
        return _measured(session, target, precision, reference, artifact, held)

    return _or_failed(look, target, precision, artifact)


def rehearse(
    target: Target,
    precision: str,
    folder: Path,
    reference: Reference,
    checkpoint: Checkpoint,
    absent: Sequence[str],
    *,
    artifact: str,
    threads: int | None = None,
) -> Parity:
    """Say what can be said of an artifact whose device is `absent`: it may fail, never pass."""
    require_runtime(target)

    def look() -> Parity:
        ask: Any = target  # of those that lack something, each has it: see Target
        found: Rehearsal = ask.rehearse(
            checkpoint, folder, precision, peak=reference.peak, threads=threads
        )
        parity = _measured(found.session, target, precision, reference, artifact)
        reason = f"rehearsed {found.where}, not verified: it needs {'; '.join(absent)}"
        return replace(_with_problems(parity, found.problems), unverified=reason)

    return _or_failed(look, target, precision, artifact)


def _measured(
    session: Session,
    target: Target,
    precision: str,
    reference: Reference,
    artifact: str,
    held: Reference | None = None,
) -> Parity:
    """Against `held`, within what rounding to nearest costs the `reference`."""
    exact = precision in target.exact_rounding
    return measure(
        session,
        held or reference,
        artifact=artifact,
        target=target.name,
        precision=precision,
        limits=limits_of(precision, reference, exact_rounding=exact),
    )


def _or_failed(look: Callable[[], Parity], target: Target, precision: str, artifact: str) -> Parity:
    try:
        return look()
    except (RuntimeMissingError, MemoryError):
        raise
    except Exception as error:  # each runtime has its own; all of them mean "does not run"
        logger.debug("%s cannot be run", artifact, exc_info=True)
        problem = f"it cannot be run: {type(error).__name__}: {error}"
        return Parity(artifact, target.name, precision, problems=(problem,))


def with_text(
    parity: Parity,
    target: Target,
    folder: Path,
    checkpoint: Checkpoint,
    chosen: Chosen | None = None,
) -> Parity:
    """Add what comes of holding the artifact's tokenizer, template and ends against those of a
    checkpoint, where both have one; and the numbers in its files, where the target reads them."""
    wrong = _wrong_in_file(target, folder, checkpoint, chosen, parity.precision)
    parity = _with_problems(parity, wrong)
    verdict = check_text(target, folder, checkpoint)
    if verdict is None:
        return parity
    problems = (*parity.problems, *verdict.problems)
    return replace(parity, problems=problems, text=verdict.as_dict())


def _wrong_in_file(
    target: Target, folder: Path, checkpoint: Checkpoint, chosen: Chosen | None, precision: str
) -> list[str]:
    """What a target that reads its files back finds there, besides what they compute."""
    ask: Any = getattr(target, "wrong_in_file", lambda *_: [])
    try:
        if chosen is None:
            return list(ask(checkpoint, folder))
        wrong = wrong_values(target, precision, folder, chosen.checkpoint, chosen.record)
        return [*ask(checkpoint, folder, chosen.record["tensors"]), *wrong]
    except Exception as error:  # of a damaged file, each reader raises its own
        return [f"its file cannot be read back: {type(error).__name__}: {error}"]


def require_runtime(target: Target) -> None:
    """Refuse a target whose runtime is not installed."""
    missing = target.missing()
    if missing:
        raise RuntimeMissingError(f"target {target.name} needs: {'; '.join(missing)}")


def require_device(target: Target) -> None:
    """Refuse a target that this machine cannot run."""
    absent = lacking(target)
    if absent:
        raise RuntimeMissingError(
            f"target {target.name} cannot be run here, so what is written for it cannot be "
            f"verified: it needs {'; '.join(absent)}. `dotexport export --no-verify` writes it "
            "all the same, marked as not verified; `dotexport verify` on a machine that has what "
            "is missing here verifies it"
        )


class Verdict(Protocol):
    """What verification of any artifact comes to."""

    @property
    def artifact(self) -> str: ...
    @property
    def passed(self) -> bool: ...
    @property
    def problems(self) -> Sequence[str]: ...


def require(parities: Iterable[Verdict], *, note: str = "") -> None:
    """Raise for those that failed, or else for those whose device was not here to ask.

    Raises:
        ParityError: with every problem of every failed artifact.
        RuntimeMissingError: with what each of the others needs.
    """
    left = [parity for parity in parities if not parity.passed]
    failed = [parity for parity in left if parity.problems or not _unverified(parity)]
    if failed:
        lines = [
            f"  {parity.artifact}: {problem}" for parity in failed for problem in parity.problems
        ]
        names = ", ".join(parity.artifact for parity in failed)
        raise ParityError(f"{names}: verification failed{note}\n" + "\n".join(lines))
    if left:
        lines = [f"  {parity.artifact}: {_unverified(parity)}" for parity in left]
        raise RuntimeMissingError("not verified here\n" + "\n".join(lines))


def _unverified(parity: Verdict) -> str | None:
    return getattr(parity, "unverified", None)


def write_report(out: Path, parities: Iterable[Parity], reference: Reference) -> None:
    """Add these figures to reports/verify.json, keeping those of other artifacts."""
    file = out / REPORT
    report = _stored(file)
    artifacts = report.get("artifacts", {}) | {p.artifact: p.as_dict() for p in parities}
    workload = {
        "prompt_lengths": reference.prompt_lengths,
        "sampled_from_model": reference.is_text,
        "decode_steps": reference.num_steps,
        "far": reference.long.reach() if reference.long else None,
        "int4_rounding_kl": rounding_kl(reference) if reference.rounded else None,
    }
    sections = {"environment": manifest.environment(), "prompts": workload, "artifacts": artifacts}
    write_json(file, report | sections)


def _stored(file: Path) -> dict[str, Any]:
    """The report so far; one that cannot be read is started again, as all can be measured."""
    try:
        report = read_json(file, advice="") if file.is_file() else {}
        validated(dict[str, dict[str, Any]], report, str(file), error=CheckpointError, advice="")
    except CheckpointError as error:
        logger.warning("%s: it is written anew", str(error).rstrip("; "))
        return {}
    return report


def _listed(out: Path) -> dict[str, dict[str, Any]]:
    artifacts: dict[str, dict[str, Any]] = manifest.read(out).get("artifacts", {})
    stock = {"target": STOCK, "precision": "as-stored", "files": {}}
    return {STOCK: stock} | artifacts


def named(out: Path, name: str, entry: Mapping[str, Any]) -> tuple[Target, str]:
    """Target and precision of a listed artifact; they decide what it is held to.

    Raises:
        CheckpointError: no such precision, or not that of an artifact of this name.
    """
    target, precision = find_target(entry["target"]), entry["precision"]
    expected = artifact_name(target, precision)
    if precision not in target.precisions or name != expected:
        raise CheckpointError(
            f"{out / MANIFEST} says that {name} is of target {target.name} and precision "
            f"{precision!r}; expected one of {', '.join(target.precisions)}, and its name to be "
            f"{expected}: it was edited, export again"
        )
    return target, precision


def picked(out: Path, targets: Sequence[str] | None) -> dict[str, tuple[Target, str]]:
    """Artifacts of an output by NAME or NAME:PRECISION, None being all: name -> target, precision.

    Raises:
        CheckpointError: `out` is not an output of dotexport, or says of one what cannot be.
        UsageError: `targets` names something that is not there.
    """
    entries = _pick(_listed(out), targets)
    return {name: named(out, name, entry) for name, entry in entries.items()}


def artifact_name(target: Target, precision: str) -> str:
    """Of its folder below OUT; the stock checkpoint has only one form."""
    return target.name if target.name == STOCK else f"{target.name}-{precision}"


def _pick(
    listed: Mapping[str, dict[str, Any]], targets: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    if targets is None:
        return dict(listed)
    picked: dict[str, dict[str, Any]] = {}
    for spec in targets:
        target, precision = resolve(spec)
        any_precision = ":" not in spec
        found = {
            name: entry
            for name, entry in listed.items()
            if entry["target"] == target.name and (any_precision or entry["precision"] == precision)
        }
        if not found:
            raise UsageError(f"no artifact of {spec} here; there are: {', '.join(listed)}")
        picked |= found
    return picked


def _with_problems(parity: Parity, problems: Sequence[str]) -> Parity:
    return replace(parity, problems=(*problems, *parity.problems))
