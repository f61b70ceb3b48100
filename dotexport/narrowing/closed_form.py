"""The closed form as healing and reports take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dotexport.narrowing.judging import Cost


@dataclass(frozen=True)
class ClosedForm:
    """What narrowing leaves behind besides the checkpoint.

    Attributes:
        E_DK: from the original's residual stream onto the narrower one, float64.
        basis: what the manifest says about it.
        costs: on held-out calibration text, then on text of another kind where there is.
        sites: reports of every solve.
        device: where it was computed.
        behind: the original's layer that each of the narrowed model's answers for.
    """

    E_DK: Tensor
    basis: dict[str, Any]
    costs: tuple[Cost, ...]
    sites: list[dict[str, Any]]
    device: str
    behind: list[int]
