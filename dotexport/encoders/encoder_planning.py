"""What a budget can be met with, before anything is narrowed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dotexport.encoders.encoder_folder import open_encoder, rows_of
from dotexport.encoders.encoder_options import SizeOptions
from dotexport.encoders.encoder_sizes import (
    before_of,
    candidates,
    num_parameters,
    parameters_after,
    parameters_of,
)
from dotexport.encoders.encoder_vocabulary import trimmed
from dotexport.encoders.encoder_walk import Progress
from dotexport.errors import UsageError


def plan(
    folder: Path,
    options: SizeOptions,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Every size that `shrink` would narrow to choose between, the deepest first.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, SizeError.
        UsageError: --vocab without the text that says which tokens stay.
    """
    encoder = original = open_encoder(folder)
    if options.vocabulary.asked:
        if options.vocabulary.vocab_for is None:
            raise UsageError(
                "plan reads no calibration text: say with --vocab-for TEXT in what the use of "
                "tokens is counted"
            )
        with tempfile.TemporaryDirectory(prefix="dotexport-") as scratch:
            encoder, _ = trimmed(original, options.vocabulary, "", Path(scratch), progress)
    kind, before, whole = original.kind, before_of(original), parameters_of(original)
    choices = []
    for sizes in candidates(encoder, options, total=whole):
        parameters = parameters_after(encoder, sizes)
        choices.append(
            {
                kind.stream: sizes.hidden,
                kind.width: sizes.width,
                kind.depth: sizes.depth,
                "vocab_size": rows_of(encoder.model),
                "parameters": parameters,
                "ratio": parameters / whole,
                "bytes": parameters * original.dtype.itemsize,
            }
        )
    return {
        "original": {
            kind.stream: before.hidden,
            kind.width: before.width,
            kind.depth: before.depth,
            "vocab_size": original.num_tokens,
            "parameters": whole,
            "parameters_of_layers": num_parameters(original.layers),
            "bytes": whole * original.dtype.itemsize,
        },
        "choices": choices,
    }
