"""The residual streams of original and narrowed model over the calibration text.

They are all that stays in memory between two layers. They lie on the device while they take no
more than a share of its free memory, else on the host, pinned; and past a share of that memory in a
memory-mapped scratch file. Of several processes each has the streams of its own windows, and what
is summed over windows is summed over processes as well.

Shapes: N windows, L tokens per window, T tokens, D width before, K width after.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from dotexport.errors import CheckpointError
from dotexport.merging.refit import Moments
from dotexport.models.beside import Beside, Through
from dotexport.models.checkpoint import reserve
from dotexport.processes.processes import ALONE, Processes

TOKENS_PER_BATCH = 4096
MEMORY_SHARE = 0.25
# Kinds of windows.
KINDS = FITTED, HELD_OUT, OTHER, JUDGING = "fitted", "held out", "other", "judging"
Rows = slice
Read = Callable[[Rows], tuple[Tensor, Tensor]]
Step = Callable[[Tensor], Tensor]
"""What becomes of some windows of a stream."""


@dataclass
class Streams:
    """Two streams (N, L, width) in float32, walked through in batches of whole windows.

    Attributes:
        windows_NL: tokens of all windows, those of other processes too.
        held_out: windows that choose ridges and accept merges; the others are fitted on.
        device: where batches are computed.
        drawn: what is the same in every layer, such as places that local healing draws.
        other: windows that are text of another kind.
        judging: windows that judge what came out, and are not fitted on; without, those held out
            do.
        processes: that share the windows.
        own: windows whose streams lie here, ascending: row n of a stream is that of `own[n]`.
        beside_original, beside_narrowed: what layers are given besides either stream.
        weights_NL: how much each token counts in a divergence (context.py), of all windows; None:
            all by one.
    """

    windows_NL: Tensor
    original_NLD: Tensor
    narrowed_NLK: Tensor
    held_out: frozenset[int]
    device: torch.device
    drawn: dict[Any, Any] = field(default_factory=dict)
    other: frozenset[int] = frozenset()
    judging: frozenset[int] = frozenset()
    processes: Processes = ALONE
    weights_NL: Tensor | None = None
    share: InitVar[Sequence[int] | None] = None
    own: Sequence[int] = field(init=False)
    beside_original: Beside = field(init=False)
    beside_narrowed: Beside = field(init=False)

    def __post_init__(self, share: Sequence[int] | None) -> None:
        self.own = range(len(self.windows_NL)) if share is None else share
        tokens_NL = self.windows_NL[list(self.own)]
        self.beside_original, self.beside_narrowed = Beside(tokens_NL), Beside(tokens_NL)

    @classmethod
    def allocate(
        cls,
        windows_NL: Tensor,
        width_before: int,
        width_after: int,
        *,
        device: torch.device,
        scratch: Path | None = None,
        other_NL: Tensor | None = None,
        processes: Processes = ALONE,
    ) -> Streams:
        """Args: other_NL: windows of another kind of text, of the same length; a share of either
        kind is held out."""
        held_out, other = held_out_windows(len(windows_NL)), frozenset[int]()
        if other_NL is not None:
            first = len(windows_NL)
            other = frozenset(range(first, first + len(other_NL)))
            held_out |= {first + window for window in held_out_windows(len(other_NL))}
            windows_NL = torch.cat([windows_NL, other_NL])
        own = dealt(len(windows_NL), held_out, other, processes)
        shape = (len(own), windows_NL.shape[1])
        widths = (width_before, width_after)
        original_NLD, narrowed_NLK = _allocated([(*shape, w) for w in widths], device, scratch)
        return cls(
            windows_NL,
            original_NLD,
            narrowed_NLK,
            held_out,
            device,
            other=other,
            processes=processes,
            share=own,
        )

    def some(self, count: int, judged: int) -> Streams:
        """Streams of their own over `count` windows to fit on, shared by the kinds, and up to
        `judged` of either kind besides: a quarter of these are held out, the others do nothing but
        judge, since what was chosen on a window looks better there.

        The furthest, and many of them: few windows hold most of what one cut loses and another does
        not. So where there are not twice as many as are held out, these judge as well.
        """
        choosing = -(-judged // 4)
        fitted, held, judging = self._fitted(count), set[int](), set[int]()
        kinds = set(range(len(self.windows_NL))) - self.other, self.other
        for kind in (kind for kind in kinds if kind & self.held_out):
            chosen_on = sorted(kind & self.held_out)[-choosing:]
            left = sorted(kind.difference(fitted, chosen_on))[-max(1, judged - choosing) :]
            held.update(chosen_on)
            judging.update(left if len(left) >= 2 * len(chosen_on) else [*left, *chosen_on])
        chosen = sorted({*fitted, *held, *judging})
        windows_NL = self.windows_NL[chosen]
        held_out, other, judges = (
            frozenset(n for n, window in enumerate(chosen) if window in kind)
            for kind in (held, self.other, judging)
        )
        own = dealt(len(chosen), held_out | judges, other, self.processes)
        shape = (len(own), windows_NL.shape[1])
        return Streams(
            windows_NL,
            self.original_NLD.new_empty((*shape, self.original_NLD.shape[-1])),
            self.narrowed_NLK.new_empty((*shape, self.narrowed_NLK.shape[-1])),
            held_out,
            self.device,
            other=other,
            judging=judges,
            processes=self.processes,
            weights_NL=None if self.weights_NL is None else self.weights_NL[chosen],
            share=own,
        )

    @property
    def of_its_kind(self) -> frozenset[int]:
        """Held-out windows of the calibration text."""
        return self.held_out - self.other

    def _fitted(self, count: int) -> list[int]:
        """The first windows to fit on, half of them of either kind where there are as many."""
        fitted = [n for n in range(len(self.windows_NL)) if n not in self.held_out]
        other = [n for n in fitted if n in self.other]
        own = [n for n in fitted if n not in self.other]
        half = min(count // 2, len(other))
        return [*own[: count - half], *other[:half]]

    def batches(self) -> Iterator[Rows]:
        """Consecutive windows, a few thousand tokens at a time, held-out ones apart."""
        count, length = len(self.own), self.windows_NL.shape[1]
        most = max(1, TOKENS_PER_BATCH // length)
        own, start = self.own, 0
        for end in range(1, count + 1):
            full = end - start == most
            if end == count or full or self._kind(own[end]) != self._kind(own[start]):
                yield slice(start, end)
                start = end

    def choosing(self) -> Iterator[Rows]:
        """Batches without the windows that do nothing but judge: what is fitted or chosen sees
        these alone."""
        return (rows for rows in self.batches() if self._kind(self.own[rows.start]) != JUDGING)

    def tokens(self, rows: Rows) -> Tensor:
        return self.windows_NL[list(self.own[rows])]

    def weights(self, rows: Rows) -> Tensor | None:
        return None if self.weights_NL is None else self.weights_NL[list(self.own[rows])]

    def places(self, windows: Collection[int]) -> list[int]:
        """Where those of these windows lie that lie here, in their order."""
        return [n for n, window in enumerate(self.own) if window in windows]

    def original(self, rows: Rows) -> Tensor:
        return self.original_NLD[rows].to(self.device, non_blocking=True)

    def narrowed(self, rows: Rows) -> Tensor:
        return self.narrowed_NLK[rows].to(self.device, non_blocking=True)

    def advance_original(self, step: Through) -> None:
        """Replace the original's stream by what lies behind its next sublayer."""
        self._advance(step, self.original_NLD, self.beside_original)

    def advance_narrowed(self, step: Through) -> None:
        """The same for the narrowed model."""
        self._advance(step, self.narrowed_NLK, self.beside_narrowed)

    def _advance(self, step: Through, stream_NLX: Tensor, beside: Beside) -> None:
        for rows in self.batches():
            behind_BLX = beside.passed(step, stream_NLX, rows, self.device)
            stream_NLX[rows] = behind_BLX.to(stream_NLX.device)

    def moments(self, read: Read, *, metric_OO: Tensor | None = None) -> tuple[Moments, Moments]:
        """Moments of the inputs and targets (B, L, features) that `read` gives for some windows.

        Returns those of the windows to fit on, and those of the held-out ones, in which both kinds
        of text count alike.
        """
        sums: dict[str, Moments] = {}
        for rows in self.choosing():
            z_TI, t_TO = (part.flatten(0, 1) for part in read(rows))
            kind = self._kind(self.own[rows.start])
            if kind not in sums:
                sums[kind] = Moments.zeros(
                    z_TI.shape[1], t_TO.shape[1], metric_OO=metric_OO, device=self.device
                )
            sums[kind].add(z_TI, t_TO)
        sums = self._summed(sums, metric_OO)
        for moments in sums.values():
            check_finite(moments.inputs.diagonal().sum() + moments.targets)
        # A single window is both: nothing can be held out of it.
        held = sums.get(HELD_OUT, sums[FITTED])
        if (other := sums.get(OTHER)) and HELD_OUT in sums:
            kinds = self.of_its_kind, self.held_out & self.other
            held.take(other, len(kinds[0]) / len(kinds[1]))
        return sums[FITTED], held

    def _summed(self, sums: dict[str, Moments], metric_OO: Tensor | None) -> dict[str, Moments]:
        """Over all processes, of which some have no window of a kind, or none at all."""
        found = self.processes.agreed(lambda: tuple(sums[FITTED].cross_OI.shape))
        every = set(range(len(self.windows_NL))) - (self.judging - self.held_out)
        kinds = dict.fromkeys(self._kind(window) for window in sorted(every))
        empty = partial(Moments.zeros, found[1], found[0], metric_OO=metric_OO, device=self.device)
        sums = {kind: sums.get(kind) or empty() for kind in kinds}
        for moments in sums.values():
            moments.sum_over(self.processes)
        return sums

    def _kind(self, window: int) -> str:
        if window in self.held_out:
            return OTHER if window in self.other else HELD_OUT
        return JUDGING if window in self.judging else FITTED


def inverse_rms(stream_BLD: Tensor) -> Tensor:
    """One over the root mean square of each token, (B, L, 1)."""
    inverse_BL1: Tensor = stream_BLD.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    return inverse_BL1


def onto(E_DK: Tensor) -> Step:
    """x E, tokens of the original's stream in the basis of the narrowed one."""
    if torch.equal(E_DK, torch.eye(len(E_DK), dtype=E_DK.dtype, device=E_DK.device)):
        return lambda x_BLD: x_BLD
    narrow_DK = E_DK.float()
    return lambda x_BLD: x_BLD @ narrow_DK


def check_finite(energy: Tensor) -> None:
    """Refuse sums over activations that overflowed, which no solve survives.

    Raises:
        CheckpointError: NaN or infinity.
    """
    if not bool(torch.isfinite(energy)):
        raise CheckpointError(
            "activations on the calibration text are NaN or infinite; expected a model that works "
            "in transformers: take an undamaged copy of it, and if it is stored in float16, "
            "convert it to bfloat16 first"
        )


def held_out_windows(count: int) -> frozenset[int]:
    """The last eighth of the windows; none of a single one.

    Windows between fitted ones are of the same articles, and flatter what learned these.
    """
    return frozenset(range(count - max(1, count // 8), count)) if count > 1 else frozenset()


def dealt(
    count: int, held_out: Collection[int], other: Collection[int], processes: Processes
) -> list[int]:
    """The windows of this process: of every kind as many as others have, but for one."""
    kinds = sorted(range(count), key=lambda window: (window in held_out, window in other))
    return sorted(kinds[processes.rank :: processes.size])


def _allocated(
    shapes: list[tuple[int, ...]], device: torch.device, scratch: Path | None
) -> list[Tensor]:
    num_bytes = sum(4 * int(np.prod(shape)) for shape in shapes)
    if device.type == "cuda" and num_bytes < MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    return [_on_host(shape, scratch, pinned=device.type == "cuda") for shape in shapes]


def _on_host(shape: tuple[int, ...], scratch: Path | None, *, pinned: bool) -> Tensor:
    num_bytes = 4 * int(np.prod(shape))
    if scratch is None or num_bytes < MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=torch.float32, pin_memory=pinned)
    with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
        reserve(file.fileno(), 0, num_bytes)
    mapped = torch.from_file(file.name, shared=True, size=num_bytes // 4, dtype=torch.float32)
    Path(file.name).unlink()  # the mapping keeps it alive, and nothing is left behind
    return mapped.view(shape)
