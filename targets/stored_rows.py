"""Rows of a stored tensor beside the checkpoint's: what rounding explains, and what it does not.

Logits do not tell everything: scales of 4-bit groups that are all off by one percent.

Shapes: R rows of a tensor, I entries of a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Limits = tuple[float, float]
"""Largest relative error of a row, and largest deviation from 1 of what a tensor is multiplied
with."""


COARSE = 0.015
"""Share of a tensor's energy in its error; roundings to 16 levels and more stay below."""


def wrong_rows(
    name: str, found_RI: NDArray[np.float32], true_RI: NDArray[np.float32], limits: Limits
) -> str | None:
    """What is wrong with a tensor, beyond these limits; None: nothing."""
    error, scale, left = _errors(np.atleast_2d(found_RI), np.atleast_2d(true_RI))
    most, off = limits
    if not error <= most:
        return f"a row of {name} is {error:.2g} off the checkpoint's, more than {most:.2g}"
    # Where few bits lose much, scales by least squares make a tensor smaller by what is lost.
    scale /= left if left < 1 - COARSE else 1.0
    if not abs(scale - 1) <= off:
        return f"{name} is {scale:.4f} times the checkpoint's; rounding explains {off:.2g}"
    return None


def _errors(
    found_RI: NDArray[np.float32], true_RI: NDArray[np.float32]
) -> tuple[float, float, float]:
    """The worst row's relative error, the factor between the tensors by least squares, and what it
    would be where nothing but rounding by least squares made it."""
    size_R = np.linalg.norm(true_RI, axis=-1)
    typical = float(np.sqrt(np.square(size_R).mean()))
    gap_R = np.linalg.norm(found_RI - true_RI, axis=-1)
    # Rows of hardly anything are rounded with their neighbours' sizes in mind.
    error = float((gap_R / np.maximum(size_R, max(1e-2 * typical, 1e-30))).max())
    energy = float(np.square(true_RI).sum())
    if not energy:
        return error, 1.0, 1.0
    scale = float((found_RI * true_RI).sum()) / energy
    return error, scale, max(1 - float(np.square(gap_R).sum()) / energy, 1e-30)
