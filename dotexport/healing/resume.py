"""Where a shrink with healing can be taken up again: a hidden folder beside its output.

`.OUT.healing-KEY` holds the closed form and the state of healing. KEY is a hash of model, text,
options and version, so the same command goes on where it was stopped and no other one does. The
folder goes when OUT is there.

    closed/hf/                  the narrowed checkpoint
    closed/basis.safetensors    E_DK
    closed/record.json          what the reports say about it; written last
    state.safetensors           weights, moments, best weights; the course of the run as JSON in
                                the header, so that both are replaced in one step
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
RECORD = "record.json"


@dataclass(frozen=True)
class ClosedForm:
    """What narrowing leaves behind besides the checkpoint.

    Attributes:
        E_DK: basis of the residual stream, float64.
        basis: what the manifest says about it.
        divergence: held-out KL divergence from the original, nats per token.
        perplexity_ratio: held-out perplexity over the original's.
        sites: reports of every solve.
        device: where it was computed.
        behind: the original's layer that each of the narrowed model's answers for.
    """

    E_DK: Tensor
    basis: dict[str, Any]
    divergence: float
    perplexity_ratio: float
    sites: list[dict[str, Any]]
    device: str
    behind: list[int]


@dataclass(frozen=True)
class Workspace:
    """The hidden folder of one command."""

    folder: Path

    @classmethod
    def of(cls, out: Path, identity: Mapping[str, Any]) -> Workspace:
        text = json.dumps(identity, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        out = out.expanduser().resolve()
        return cls(out.parent / f"{_prefix(out)}{key}")

    def closed_form(self, hf: Path) -> ClosedForm | None:
        """Copy the narrowed checkpoint to `hf` and say what it is; None: not there yet."""
        closed = self.folder / "closed"
        if not (closed / RECORD).is_file():
            return None
        record = read_json(closed / RECORD, advice=f"remove {self.folder} to start afresh")
        with _opened(closed / "basis.safetensors") as file:
            E_DK = file.get_tensor("E_DK")
        shutil.copytree(closed / "hf", hf)
        logger.info("going on from %s", self.folder)
        try:
            return ClosedForm(E_DK, **record)
        except TypeError as error:  # of another release
            raise CheckpointError(
                f"{closed / RECORD} is not what is written there ({error}); remove {self.folder} "
                "to start afresh"
            ) from error

    def keep_closed_form(self, closed_form: ClosedForm, hf: Path) -> None:
        """Keep the narrowed checkpoint in `hf`; its record comes last, when the rest is whole."""
        closed = self.folder / "closed"
        shutil.rmtree(self.folder, ignore_errors=True)
        closed.mkdir(parents=True)
        shutil.copytree(hf, closed / "hf")
        _save({"E_DK": closed_form.E_DK}, {}, closed / "basis.safetensors")
        record = asdict(closed_form)
        del record["E_DK"]
        write_json(closed / RECORD, record)

    def save(self, tensors: Mapping[str, Tensor], course: Mapping[str, Any]) -> None:
        """Replace the state of healing in one step."""
        _save(tensors, course, self.folder / STATE)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of healing, or None at the start."""
        if not (self.folder / STATE).is_file():
            return None
        with _opened(self.folder / STATE) as file:
            course = json.loads(file.metadata()["course"])
            # Copies: what is mapped from the file would change under us when it is replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        logger.warning("healing goes on after step %d", course["step"])
        return tensors, course

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def settle_others(out: Path, keep: Workspace | None, *, overwrite: bool) -> None:
    """Refuse what other commands left unfinished for this output; with `overwrite`, remove it.

    Raises:
        UsageError: there is something, and hours of work may be in it.
    """
    out = out.expanduser().resolve()
    for folder in sorted(out.parent.glob(f"{escape(_prefix(out))}*")):
        if keep is not None and folder == keep.folder:
            continue
        if not overwrite:
            raise UsageError(
                f"{folder} holds the unfinished healing of another command for {out}; run that "
                "command again to finish it, pass --overwrite to discard it, or give another "
                "output folder"
            )
        logger.warning("discarding the unfinished healing of another command in %s", folder)
        shutil.rmtree(folder)


def _prefix(out: Path) -> str:
    return f".{out.name}.healing-"


def _save(tensors: Mapping[str, Tensor], course: Mapping[str, Any], file: Path) -> None:
    partial = file.with_suffix(".partial")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, partial, metadata={"format": "pt", "course": json.dumps(course)})
        with partial.open("r+b") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); remove {file.parent} to start afresh"
        ) from error
