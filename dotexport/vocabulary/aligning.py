"""One text in two tokenizations, side by side: where both have a boundary.

Shapes: N tokens of one tokenization, M of the other, B boundaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dotexport.errors import CheckpointError
from dotexport.vocabulary.pieces import Pieces

Ids = NDArray[np.int64]


def lengths(ids: Mapping[str, int], added: Sequence[str], pieces: Pieces, rows: int) -> Ids:
    """Bytes of text that each id stands for; a row without a token stands for none.

    Args:
        ids: every token and its id.
        added: those which are looked for in a text as they are.
    """
    found = np.zeros(rows, dtype=np.int64)
    whole = set(added)
    for token, number in ids.items():
        found[number] = len(token.encode()) if token in whole else pieces.num_bytes(token)
    return found


@dataclass(frozen=True)
class Aligned:
    """Two tokenizations of a text.

    Attributes:
        one_N, other_M: token ids.
        marks_B2: places in both in front of which both have a boundary; the first is (0, 0), the
            last is behind both.
    """

    one_N: Ids
    other_M: Ids
    marks_B2: Ids


def align(one: Sequence[int], other: Sequence[int], widths: Ids, other_widths: Ids) -> Aligned:
    """Lay them side by side by the bytes that tokens stand for.

    Raises:
        CheckpointError: they stand for different numbers of bytes.
    """
    one_N, other_M = np.asarray(one, dtype=np.int64), np.asarray(other, dtype=np.int64)
    ends_N, ends_M = widths[one_N].cumsum(), other_widths[other_M].cumsum()
    if (ends_N[-1:] != ends_M[-1:]).any() or not len(one_N) or not len(other_M):
        raise CheckpointError(
            "two tokenizers read one text as different bytes, so that nothing can be compared "
            "token by token; expected an original and what was made from it"
        )
    _, at_N, at_M = np.intersect1d(ends_N, ends_M, return_indices=True)
    inner_B2 = np.stack([at_N, at_M], axis=1) + 1
    return Aligned(one_N, other_M, np.concatenate([np.zeros((1, 2), dtype=np.int64), inner_B2]))
