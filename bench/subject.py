"""Which artifact stands for a folder: the one given, one inside an output, a fresh export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotexport.errors import DotexportError, UnsupportedModelError, UsageError
from dotexport.exports.alone import alone
from dotexport.exports.target import Target
from dotexport.storage import manifest
from dotexport.storage.output import folder_bytes

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

STOCK = "hf"


@dataclass(frozen=True)
class Subject:
    """A model as it will be loaded.

    Attributes:
        name: "candidate" or "baseline".
        source: the folder that was given.
        artifact: the folder that the target opens.
        num_bytes: of the artifact.
        num_parameters, context, config: None where no checkpoint lies beside the artifact.
    """

    name: str
    source: Path
    artifact: Path
    num_bytes: int
    num_parameters: int | None
    context: int | None = None
    config: Mapping[str, Any] | None = None

    def check_fits(self, num_tokens: int) -> None:
        """Refuse sequences longer than the model was made for.

        Raises:
            UsageError: the context is shorter than that.
        """
        if self.context is not None and num_tokens > self.context:
            raise UsageError(
                f"prompt and generation take {num_tokens} tokens, and the context of the "
                f"{self.name} {self.source} is {self.context}; ask for fewer"
            )


def choose_precision(target: Target, asked: str | None, *folders: Path) -> str:
    """The precision asked for; else the only one a folder has an artifact of; else the default.

    Raises:
        UsageError: the target cannot write it, or several artifacts leave it open.
    """
    if asked is not None:
        if asked not in target.precisions:
            raise UsageError(
                f"target {target.name} cannot write {asked!r}; "
                f"it writes {', '.join(target.precisions)}"
            )
        return asked
    for folder in folders:
        found = [p for p in target.precisions if _holds(folder, target, p)]
        if len(found) > 1:
            raise UsageError(
                f"{folder} holds several artifacts of {target.name} ({', '.join(found)}); "
                "say which with --precision"
            )
        if found:
            return found[0]
    return target.precisions[0]


def find_subject(name: str, source: Path, target: Target, precision: str, scratch: Path) -> Subject:
    """Find or make the artifact of one model.

    Raises:
        UsageError: the folder does not exist, or holds neither a model nor an artifact.
        UnsupportedModelError: the target cannot hold this model.
    """
    if source.is_file():
        from dotexport.models.finding import opened

        source = opened(source)
    if not source.is_dir():
        raise UsageError(
            f"{name} {source} is no folder; expected an output of dotexport, a model folder, "
            f"a GGUF file or an artifact of {target.name}"
        )
    checkpoint = _checkpoint(source)
    parameters = checkpoint.num_parameters if checkpoint else None
    context = checkpoint.config.get("max_position_embeddings") if checkpoint else None
    artifact = _existing(source, target, precision)
    if artifact is None and checkpoint is not None:
        manifest.require_unchanged(checkpoint.folder)
        if target.name == STOCK and precision == target.precisions[0]:
            artifact = checkpoint.folder
        else:
            artifact = _export(name, checkpoint, target, precision, scratch)
    if artifact is None:
        artifact = _as_artifact(name, source, target)
    manifest.require_unchanged(artifact)
    config = checkpoint.config if checkpoint else None
    return Subject(name, source, artifact, _num_bytes(artifact), parameters, context, config)


def _holds(folder: Path, target: Target, precision: str) -> bool:
    named = f"{target.name}-{precision}"
    return (folder / named).is_dir() or folder.name == named


def _existing(source: Path, target: Target, precision: str) -> Path | None:
    named = f"{target.name}-{precision}"
    if (source / named).is_dir():
        return source / named
    return source if source.name == named else None


def _checkpoint(source: Path) -> Checkpoint | None:
    """The stock checkpoint in, at, or (for an artifact inside an output) beside this folder."""
    folders = (source / STOCK, source, source.resolve().parent / STOCK)
    return next((_open(folder) for folder in folders if _is_checkpoint(folder)), None)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _open(folder: Path) -> Checkpoint:
    # Imported late, for torch comes with it: the workers import this package too, and the memory
    # of a runtime that needs no torch should not hold it.
    from dotexport.models.checkpoint import Checkpoint

    return Checkpoint.open(folder)


def _as_artifact(name: str, source: Path, target: Target) -> Path:
    # No weights to export from: it must be an artifact under a name of its own.
    if not any(file.is_file() for file in source.iterdir()):
        raise UsageError(
            f"{name} {source} holds neither an artifact of {target.name} nor a model; expected "
            f"{target.name}-PRECISION/ or hf/ in it, or config.json with *.safetensors"
        )
    return source


def _export(
    name: str, checkpoint: Checkpoint, target: Target, precision: str, scratch: Path
) -> Path:
    problems = target.problems(checkpoint, precision)
    if problems:
        raise UnsupportedModelError(
            f"{name} {checkpoint.folder} cannot be exported to {target.name} ({precision}): "
            + "; ".join(problems)
        )
    folder = scratch / name
    folder.mkdir()
    try:
        with alone(checkpoint) as language_model:
            target.write(language_model, folder, precision)
    except OSError as error:
        raise DotexportError(
            f"{name} could not be exported into {scratch} ({error}); "
            "free some space, or export it beforehand with `dotexport export`"
        ) from error
    return folder


def _num_bytes(artifact: Path) -> int:
    """Bytes of an artifact; of a checkpoint, whose folder may hold anything, only its own files."""
    if _is_checkpoint(artifact):
        checkpoint = _open(artifact)
        files = {*checkpoint.files.values(), artifact / "config.json", *checkpoint.companions()}
        return sum(file.stat().st_size for file in files)
    return folder_bytes(artifact)
