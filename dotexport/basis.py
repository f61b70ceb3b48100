"""Basis of the residual stream: which K directions of its D a narrower model keeps.

All three methods answer with the same thing, so they are interchangeable and each is measured.

Shapes: D width before, K width after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dotexport.errors import UsageError
from dotexport.ot.cost import Array, Indices, activation_distance
from dotexport.ot.coupling import Coupling, TransportOptions, couple


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns E_DK: the narrow stream is E^T x.

    Attributes:
        kept_energy: share of the second moment that lies in the span; 1 keeps all.
        coupling: the transport plan it came from, if it came from one.
    """

    matrix_DK: Array
    method: str
    kept_energy: float
    coupling: Coupling | None = None

    def as_dict(self) -> dict[str, Any]:
        """What the manifest says about it."""
        plan = self.coupling.as_dict() if self.coupling else {}
        return {"method": self.method, "kept_energy": self.kept_energy, **plan}


def whole(width: int) -> Basis:
    """The identity: an untouched residual stream."""
    return Basis(np.eye(width), "identity", 1.0)


def find_basis(
    method: str, moment_DD: Array, width: int, transport: TransportOptions | None = None
) -> Basis:
    """A basis of `width` columns by one of METHODS.

    Args:
        moment_DD: second moment of the normalised stream, averaged over all norm sites.

    Raises:
        UsageError: unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"basis must be one of {', '.join(METHODS)}, not {method!r}")
    matrix_DK, coupling = METHODS[method](moment_DD, width, transport or TransportOptions())
    kept = np.trace(matrix_DK.T @ moment_DD @ matrix_DK) / np.trace(moment_DD)
    return Basis(matrix_DK, method, float(kept), coupling)


def _select(moment_DD: Array, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Keep the axes with the largest second moment."""
    return np.eye(len(moment_DD))[:, _largest(moment_DD, width)], None


def _pca(moment_DD: Array, width: int, options: TransportOptions) -> tuple[Array, None]:
    """Keep the leading eigenvectors: the least squared error a projection can have."""
    vectors_DD = np.linalg.eigh(moment_DD).eigenvectors
    return _fixed_signs(vectors_DD[:, ::-1][:, :width]), None


def _dot(moment_DD: Array, width: int, options: TransportOptions) -> tuple[Array, Coupling]:
    """Merge axes by transport onto the strongest ones, then orthonormalise: M = Q R.

    The factorisation that carries a merge past RMSNorm is that of DOTResize (arXiv 2507.04517).
    With the pseudo-inverse as decoder R cancels, M M^+ = Q Q^T, so Q is all that is needed.
    """
    kept_K = _largest(moment_DD, width)
    cost = activation_distance(moment_DD, kept_K, signed=True)
    coupling = couple(cost, np.sqrt(np.maximum(np.diag(moment_DD), 0.0)), options)
    q_DK, _ = np.linalg.qr(coupling.merge_map())
    return _fixed_signs(q_DK), coupling


METHODS: dict[str, Callable[[Array, int, TransportOptions], tuple[Array, Coupling | None]]] = {
    "dot": _dot,
    "pca": _pca,
    "select": _select,
}


def _largest(moment_DD: Array, width: int) -> Indices:
    order = np.argsort(-np.diag(moment_DD), kind="stable")
    return np.sort(order[:width])


def _fixed_signs(matrix_DK: Array) -> Array:
    """Make each column's largest entry positive: eigenvectors and QR leave the sign open."""
    largest_K = np.abs(matrix_DK).argmax(0)
    signs_K = np.sign(matrix_DK[largest_K, np.arange(matrix_DK.shape[1])])
    oriented_DK: Array = matrix_DK * np.where(signs_K == 0, 1.0, signs_K)
    return oriented_DK
