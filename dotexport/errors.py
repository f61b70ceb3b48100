"""What can go wrong, and the exit code the command line gives for it.

    DotexportError            1  anything that failed while the request itself was sound
    ├── CheckpointError       1  not a model folder, a missing shard, truncated or NaN weights
    ├── CalibrationError      1  no text, or too little of it
    ├── LostProcessError      1  another process of the same run ended
    ├── UsageError            2  the request itself is wrong: flags, recipe, an output that exists
    ├── ParityError           3  an artifact does not compute what torch computes
    ├── GateError             4  a measured figure misses what was asked of it
    ├── SizeError             5  sizes that no consumer could load
    ├── UnsupportedModelError 5  an architecture without a family table
    └── RuntimeMissingError   6  a runtime is not installed, or a provider fell back

Every message names the thing, says what was expected, and says what to do.
"""

from __future__ import annotations


class DotexportError(Exception):
    """Root of everything dotexport raises on purpose."""

    exit_code = 1


class CheckpointError(DotexportError):
    """The model folder cannot be read as it is."""


class CalibrationError(DotexportError):
    """The calibration or evaluation text cannot serve."""


class LostProcessError(DotexportError):
    """Another process of the same run ended, which was waited for."""


class UsageError(DotexportError):
    """The request itself is wrong."""

    exit_code = 2


class ParityError(DotexportError):
    """An artifact does not compute what the torch model computes."""

    exit_code = 3


class GateError(DotexportError):
    """A measured figure misses what was asked of it."""

    exit_code = 4


class SizeError(DotexportError):
    """Sizes that the carrier class or a consumer cannot hold."""

    exit_code = 5


class UnsupportedModelError(DotexportError):
    """No family table describes this architecture."""

    exit_code = 5


class RuntimeMissingError(DotexportError):
    """A runtime is not installed, or an execution provider fell back."""

    exit_code = 6
