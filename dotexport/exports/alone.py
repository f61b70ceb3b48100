"""A language model in a folder of its own, which is what targets read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint, stored_config
from dotexport.models.multimodal import is_multimodal


@contextmanager
def alone(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The same checkpoint; one that lies among towers is copied out of them for this block."""
    if not is_multimodal(stored_config(checkpoint.folder)):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="dotexport-") as place:
        find_target("hf").write(checkpoint, Path(place), "as-stored")
        yield Checkpoint.open(Path(place))
