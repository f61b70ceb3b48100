"""The embedded model: where it lies, and the installed text that it never saw.

Importing this needs nothing but the standard library; `train.py` is the only file with torch.
"""

from __future__ import annotations

from pathlib import Path

from dotexport.embedded.held_out import CALIBRATION, EVALUATION, read_modules

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"


def calibration_text() -> list[str]:
    """The sources of the calibration modules, one string each, as installed here."""
    return read_modules(CALIBRATION)


def evaluation_text() -> list[str]:
    """The sources of the evaluation modules, one string each, as installed here."""
    return read_modules(EVALUATION)


__all__ = ["CALIBRATION", "EVALUATION", "MODEL_DIR", "calibration_text", "evaluation_text"]
