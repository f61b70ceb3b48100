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
from dotexport.vocabulary.joining import END, UNKNOWN, Spellings

TOKENS_AT_ONCE = 2048
THEIR_NATS = 1  # their place in what `predictions` gives
NONE = -1
LOGITS_BYTES = 32 << 20  # of a chunk's logits; a few of these exist at a time


@dataclass(frozen=True)
class Judgement:
    """How a model does on the held-out windows.

    Attributes:
        kl: mean KL(original || model) per prediction, in nats.
        perplexity, original_perplexity: of both on the same text, per token of the model.
    """

    kl: float
    perplexity: float
    original_perplexity: float


@dataclass(frozen=True)
class Theirs:
    """What the original makes of some windows, on the host.

    Attributes:
        states_CD: behind its last norm.
        next_C: its token that begins behind each prediction; NONE within one.
        counted_C: predictions that are judged.
        given: what pieces they make likely, where the original's tokens are others.
    """

    states_CD: Tensor
    next_C: Tensor
    counted_C: Tensor
    given: Given | None = None

    @classmethod
    def of(
        cls, windows_BL: Tensor, ask: Callable[[Tensor], Tensor], spellings: Spellings | None
    ) -> Theirs:
        """Args: ask: the original for its states (C, D) behind tokens (B, L)."""
        if spellings is None:
            next_C = windows_BL[:, 1:].flatten()
            return cls(ask(windows_BL[:, :-1]), next_C, torch.ones_like(next_C, dtype=torch.bool))
        joined = spellings.joined(windows_BL)
        at_BL, given_BL = (part.reshape(windows_BL.shape) for part in (joined.at_C, joined.given_C))
        at_C, given_C, behind_C = (
            part.flatten() for part in (at_BL[:, :-1], given_BL[:, :-1], given_BL[:, 1:])
        )
        next_C = joined.ids_BL.flatten()[(at_C + 1).clamp(max=windows_BL.numel() - 1)]
        # The token whose end is not in the window is not known either.
        counted_C = (given_C != UNKNOWN) & (behind_C != UNKNOWN)
        return cls(
            ask(joined.ids_BL)[at_C],
            torch.where(given_C == END, next_C, NONE),
            counted_C,
            Given(spellings, given_C),
        )

    def nats(self, log_p_CO: Tensor, some: slice) -> Tensor:
        """Of the text by the original's own tokens: a piece within one was said with its first."""
        next_C = self.next_C[some].to(log_p_CO.device)
        found_C = -log_p_CO.gather(1, next_C.clamp(min=0)[:, None])[:, 0].double()
        return torch.where(next_C == NONE, 0.0, found_C)


@dataclass(frozen=True)
class HeldOut:
    """Windows that nothing is trained on, and what the original makes of them, in float32.

    Attributes:
        windows: those of this process, some at a time; and whether they count: all processes read
            as often.
        theirs: what the original makes of each: it is asked once.
        head: of the original, read anew whenever it is asked for.
        reads: how a model is asked for its states.
    """

    windows: tuple[tuple[Tensor, bool], ...]
    theirs: tuple[Theirs, ...]
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

        def ask(ids_BL: Tensor) -> Tensor:
            return _read(teacher, ids_BL, reads).cpu()

        theirs = (Theirs.of(windows_BL, ask, spellings) for windows_BL, _ in windows)
        return cls(windows, tuple(theirs), head, reads, processes)


@torch.no_grad()
def judge(student: Any, held: HeldOut) -> Judgement:
    """KL and perplexity on whole windows, in float32 whatever the steps compute in."""
    theirs = held.head()
    rows = LOGITS_BYTES // (4 * len(theirs.table_VK))
    device = theirs.table_VK.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for (windows_BL, counts), original in zip(held.windows, held.theirs, strict=True):
        ours_CK = _read(student, windows_BL[:, :-1], held.reads)
        if not counts:
            continue
        ours, next_C = Head.of(student), windows_BL[:, 1:].flatten().to(device)
        for chunk in slices(len(next_C), rows):
            said_CV = theirs.logits(original.states_CD[chunk].to(device))
            nats_C = None
            if original.given is not None:
                log_p_CO = log_softmax(said_CV, -1)
                said_CV, nats_C = (
                    original.given[chunk].odds(log_p_CO),
                    original.nats(log_p_CO, chunk),
                )
            found_C4 = predictions(ours.logits(ours_CK[chunk]), said_CV, next_C[chunk])
            if nats_C is not None:
                found_C4[:, THEIR_NATS] = nats_C
            counted_C = original.counted_C[chunk].to(device)
            sums[:4] += found_C4[counted_C].sum(0)
            sums[4] += counted_C.sum()
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
