"""How a model that is being healed does on held-out windows, with weights as they will be stored.

Shapes: N windows, L tokens per window, P = L - 1 predictions of one, B windows at once,
C predictions, D width of the original, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from dotexport.exports.quality import predictions
from dotexport.healing.distil_head import Given, Head, slices
from dotexport.healing.distil_loss import Reads, read
from dotexport.processes.processes import ALONE, Processes
from dotexport.vocabulary.joining import Spellings

TOKENS_AT_ONCE = 2048
KL = 2  # its place in what `predictions` gives
LOGITS_BYTES = 32 << 20  # of a chunk's logits; a few of these exist at a time


@dataclass(frozen=True)
class Judgement:
    """How a model does on the held-out windows.

    Attributes:
        kl: mean KL(original || model) per prediction, in nats.
        perplexity, original_perplexity: of both on the same predictions.
    """

    kl: float
    perplexity: float
    original_perplexity: float


@dataclass(frozen=True)
class HeldOut:
    """Windows that nothing is trained on, and what the original makes of them, in float32.

    Attributes:
        windows: those of this process, some at a time; and whether they count: all processes read
            as often.
        theirs: hidden states behind the original's last norm, on the host: it is asked once.
        given: what pieces these predictions make likely, where the original's tokens are others.
        head: of the original, read anew whenever it is asked for.
        reads: how a model is asked for its states.
    """

    windows: tuple[tuple[Tensor, bool], ...]
    theirs: tuple[Tensor, ...]
    given: tuple[Given | None, ...]
    head: Callable[[], Head]
    reads: Reads
    processes: Processes

    @classmethod
    def of(
        cls,
        windows_NL: Tensor,
        teacher: Any,
        head: Callable[[], Head],
        reads: Reads = read,
        processes: Processes = ALONE,
        spellings: Spellings | None = None,
    ) -> HeldOut:
        """What a teacher in float32 makes of them.

        Args:
            spellings: of its tokens that are none of the windows'; None: they are the same.
        """
        windows = tuple(_own(windows_NL, processes))
        theirs, given = [], []
        for windows_BL, _ in windows:
            joined = spellings.joined(windows_BL[:, :-1]) if spellings else None
            read_BL = windows_BL[:, :-1] if joined is None else joined.ids_BL
            found_CD = _read(teacher, read_BL, reads).cpu()
            theirs.append(found_CD if joined is None else found_CD[joined.at_C])
            given.append(Given(spellings.odds, joined.given_C) if spellings and joined else None)
        return cls(windows, tuple(theirs), tuple(given), head, reads, processes)


@torch.no_grad()
def judge(student: Any, held: HeldOut) -> Judgement:
    """KL and perplexity on whole windows, in float32 whatever the steps compute in."""
    theirs = held.head()
    rows = LOGITS_BYTES // (4 * len(theirs.table_VK))
    device = theirs.table_VK.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    asked = zip(held.windows, held.theirs, held.given, strict=True)
    for (windows_BL, counts), theirs_CD, given in asked:
        ours_CK = _read(student, windows_BL[:, :-1], held.reads)
        next_C = windows_BL[:, 1:].flatten()
        if not counts:
            continue
        ours, next_C, theirs_CD = Head.of(student), next_C.to(device), theirs_CD.to(device)
        for chunk in slices(len(next_C), rows):
            said_CV = theirs.logits(theirs_CD[chunk])
            worth_C = torch.ones(len(said_CV), dtype=torch.float64, device=device)
            if given is not None:
                said_CV, worth_C = given[chunk](log_softmax(said_CV, -1))
            found_C4 = predictions(ours.logits(ours_CK[chunk]), said_CV, next_C[chunk])
            found_C4[:, KL] *= worth_C
            known_C = worth_C > 0
            sums[:4] += found_C4[known_C].sum(0)
            sums[4] += known_C.sum()
    held.processes.sum(sums)
    nats, original, kl, _ = (sums[:4] / sums[4]).tolist()
    return Judgement(kl, math.exp(min(nats, 700.0)), math.exp(min(original, 700.0)))


@torch.no_grad()
def _read(model: Any, windows_BL: Tensor, reads: Reads) -> Tensor:
    return reads(model, windows_BL.to(model.device), streams=False)[0]


def _own(windows_NL: Tensor, processes: Processes) -> Iterator[tuple[Tensor, bool]]:
    """Every so-manieth of all; in the last turn some processes read what another counts."""
    parts = torch.split(windows_NL, max(1, TOKENS_AT_ONCE // windows_NL.shape[1]))
    for first in range(0, len(parts), processes.size):
        place = first + processes.rank
        yield parts[min(place, len(parts) - 1)], place < len(parts)
