"""The norm of a narrower stream: the one rule by which it computes what the wider one did."""

from __future__ import annotations

import math
from typing import NamedTuple


class ExactNorm(NamedTuple):
    """What a stock RMSNorm over K axes needs to agree with the original's over D.

    Attributes:
        gain: what all that reads the norm is multiplied with.
        epsilon: rms_norm_eps of the narrower class.
    """

    gain: float
    epsilon: float


def exact_norm(
    before: int, after: int, epsilon: float, *, epsilon_stays: bool = False
) -> ExactNorm:
    """From D = `before` axes to K = `after`: gain sqrt(D / K), epsilon D / K times as large.

    Both norms divide by the root of a mean of squares, one over D and the other over K. For a
    stream x of D axes that lies in K of them, x = E y with orthonormal E,

        x / sqrt(|x|^2 / D + eps) = sqrt(D / K) E y / sqrt(|y|^2 / K + eps D / K).

    Other norms of a layer have the same epsilon. Where one of them cannot follow, epsilon stays and
    the narrower stream is z = sqrt(K / D) y: what reads it has the same gain,

        x / sqrt(|x|^2 / D + eps) = sqrt(D / K) E z / sqrt(|z|^2 / K + eps).

    >>> exact_norm(64, 16, 1e-6)
    ExactNorm(gain=2.0, epsilon=4e-06)
    """
    if epsilon_stays:
        return exact_norm(before, after, epsilon)._replace(epsilon=epsilon)
    return ExactNorm(math.sqrt(before / after), epsilon * before / after)
