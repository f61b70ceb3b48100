"""Cost between neurons: how unlike two units are, given what each one computes.

Everything is read from a Gram matrix, so the activations themselves never have to be kept.

Shapes: N neurons before, K neurons after (`kept` lists them, each also one of the N), T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


class Cost(NamedTuple):
    """What it costs to let neuron j stand for neuron i, and with which sign it does."""

    cost_NK: Array
    sign_NK: Array


def cosine(gram_NN: Array, kept_K: Indices) -> Array:
    """Cosine between the activation vectors of every neuron and every kept one.

    `gram_NN` is the sum over tokens of a a^T. A neuron that never fires has cosine 0 with all.
    """
    norm_N = norms(np.diag(gram_NN))
    return cosines(gram_NN[:, kept_K], norm_N, norm_N[kept_K])


def norms(diagonal_N: Array) -> Array:
    """Length of each activation vector, from the diagonal of their Gram matrix."""
    norm_N: Array = np.sqrt(np.maximum(diagonal_N, 0.0))
    return norm_N


def cosines(gram_NK: Array, norm_N: Array, norm_K: Array) -> Array:
    """The same for some neurons, from their products with the kept ones."""
    scale_NK = norm_N[:, None] * norm_K[None]
    cosine_NK: Array = np.divide(gram_NK, scale_NK, out=np.zeros_like(scale_NK), where=scale_NK > 0)
    return np.clip(cosine_NK, -1.0, 1.0)


def activation_distance(gram_NN: Array, kept_K: Indices) -> Cost:
    """Euclidean distance of unit activation vectors, `|| a_i/|a_i| - s_ij a_j/|a_j| ||_2`.

    The sign s_ij is free where the site lets a neuron stand for another upside down .
    The cost is divided by its maximum, so that a regularisation has one meaning at every site.
    After DOTResize (arXiv 2507.04517), there without the sign.

    >>> gram = np.array([[1.0, -1.0], [-1.0, 1.0]])  # two neurons, one the other's negative
    >>> activation_distance(gram, np.array([0])).cost_NK.ravel().tolist()
    [0.0, 0.0]
    """
    cosine_NK = cosine(gram_NN, kept_K)
    return distance(cosine_NK, largest_distance(cosine_NK))


def distance(cosine_NK: Array, largest: float) -> Cost:
    """That of neurons with these cosines, in units of the largest of all."""
    sign_NK = np.where(cosine_NK < 0, -1.0, 1.0)
    distance_NK = np.sqrt(np.maximum(2.0 - 2.0 * sign_NK * cosine_NK, 0.0))
    return Cost(distance_NK / largest if largest > 0 else distance_NK, sign_NK)


def largest_distance(cosine_NK: Array) -> float:
    """Between neurons with these cosines: that of the least alike."""
    return float(np.sqrt(2.0 - 2.0 * np.abs(cosine_NK).min(initial=1.0)))


def same_sign_distance(gram_NN: Array, kept_K: Indices) -> Cost:
    """Distance of unit activation vectors, `|| a_i/|a_i| - a_j/|a_j| ||`, over its maximum."""
    distance_NK = np.sqrt(np.maximum(2.0 - 2.0 * cosine(gram_NN, kept_K), 0.0))
    return Cost(distance_NK / max(distance_NK.max(initial=0.0), 1e-300), np.ones_like(distance_NK))
