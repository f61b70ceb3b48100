"""The text that an export rounds weights for, from what was asked for."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from dotexport.exports.calibrating import Progress, Text
from dotexport.exports.exporting import ReadText
from dotexport.exports.rounding_options import RoundingOptions
from dotexport.generation.own_text import write_own_text
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.prepare import pick_device


def text_of(
    options: RoundingOptions, progress: Progress = lambda stage, done, total: None
) -> ReadText | None:
    """Reads the text as a model's tokens; None: none was asked for.

    Where it has a part `self`, the model that is exported samples it.
    """
    if options.calib is None:
        return None

    def read(checkpoint: Checkpoint) -> Text:
        context = checkpoint.config.get("max_position_embeddings") or options.seqlen
        asked = options.text(context)
        with tempfile.TemporaryDirectory(prefix="dotexport-") as scratch:
            text, _ = write_own_text(
                checkpoint,
                asked,
                asked.samples,
                Path(scratch) / "self.jsonl",
                seed=0,
                device=pick_device("auto"),
                progress=progress,
            )
            windows_NL = token_windows(checkpoint.folder, text)
        return Text(
            windows_NL,
            {
                "text": asked.source,
                "tokens": windows_NL.numel(),
                "seqlen": windows_NL.shape[1],
                "sha256": hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest(),
            },
        )

    return read
