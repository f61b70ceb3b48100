"""What a run has finished so far, in a hidden folder beside its output: the same command goes on.

    .OUT.unfinished-KEY/STEP.safetensors    tensors of one step; what else it found is JSON in the
                                            header, so that both are there in one move

KEY is a hash of all that the command asks for. A step is taken only where the digest in its header
is that of its content and of what it was made from: one that is damaged, or of a text that has
changed since, is made again. The folder goes when OUT is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage.output import folder_bytes
from dotexport.storage.reading import parse_json

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass
class Workspace:
    """The finished steps of one command; without a folder nothing is kept.

    Attributes:
        made_from: digest of the inputs that are known by now besides those of KEY.
        full: whether a step could not be kept; it is said once, and the run goes on.
    """

    folder: Path | None = None
    made_from: str = ""
    full: bool = False

    @classmethod
    def of(cls, out: Path, identity: Mapping[str, Any]) -> Workspace:
        """That of the command with this identity and no other."""
        out = out.expanduser().resolve()
        return cls(out.parent / f"{_prefix(out)}{_sha256(_json(identity))[:16]}")

    def given(self, inputs: Mapping[str, Any]) -> None:
        """From now on, steps are made from these inputs as well."""
        self.made_from = _sha256(_json([self.made_from, inputs]))

    def save(self, step: str, record: Record, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep a step, in the place of an older one of its name."""
        if self.folder is None:
            return
        stored = {
            name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()
        }
        said = json.dumps(record)
        header = {"format": "pt", "record": said, "digest": self._digest(said, stored)}
        partial = self._file(step).with_suffix(".partial")
        try:
            self.folder.mkdir(exist_ok=True)
            save_file(stored, partial, metadata=header)
            with partial.open("r+b") as stream:
                os.fsync(stream.fileno())
            partial.replace(self._file(step))
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if not self.full:
                self.full = True
                logger.warning("%s cannot be kept (%s); the run goes on without", partial, error)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load(self, step: str) -> tuple[Record, dict[str, Tensor]] | None:
        """What was kept of a step; None: nothing that is whole and of the same inputs."""
        if not self.has(step):
            return None
        file = self._file(step)
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                # Copies: what is mapped from the file would change under us when it is replaced.
                tensors = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
            if header["digest"] == self._digest(header["record"], tensors):
                return parse_json(header["record"]), tensors
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.info("%s: %s", file, error)
        logger.warning("%s is damaged or of other inputs: this step is made again", file)
        return None

    def has(self, step: str) -> bool:
        """Whether there is a file of this step, whatever it holds."""
        return self.folder is not None and self._file(step).is_file()

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whoever is stopped in this block is told what is kept, and where; of a model that turns
        out to be damaged, nothing is.

        Raises:
            KeyboardInterrupt: with these words.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(*self._words()) from stop
        except CheckpointError:
            self.remove()
            raise
        except Exception:
            for words in self._words():
                logger.warning("%s", words)
            raise

    def _words(self) -> list[str]:
        if self.folder is None or not self.folder.is_dir():
            return []
        size = f"{folder_bytes(self.folder) / 1e6:,.1f} MB"
        kept = f"what was finished is kept in {self.folder} ({size})"
        return [f"{kept}; run the same command again and it goes on from there"]

    def _file(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"

    def _digest(self, record: str, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(_json([self.made_from, record]).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def settle_others(out: Path, keep: Workspace, *, discard: bool) -> None:
    """Refuse what other commands left unfinished for this output; with `discard`, remove it.

    Raises:
        UsageError: there is something, and hours of work may be in it.
    """
    out = out.expanduser().resolve()
    for folder in sorted(out.parent.glob(f"{escape(_prefix(out))}*")):
        if folder == keep.folder:
            continue
        if not discard:
            raise UsageError(
                f"{folder} holds the unfinished work of another command for {out}; run that "
                "command again to finish it, pass --overwrite (shrink: or --no-resume) to discard "
                "it, or give another output folder"
            )
        logger.warning("discarding the unfinished work of another command in %s", folder)
        shutil.rmtree(folder)


def _prefix(out: Path) -> str:
    return f".{out.name}.unfinished-"


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
