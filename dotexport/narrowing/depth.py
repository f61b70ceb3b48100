"""Which layers leave: the ones whose absence, once repaired, the head notices least.

Greedily, a layer at a time. In front of a cut the last writer is fitted to the original's stream
behind it, as the narrowing will do, and the candidate is judged by its KL divergence from the
original on windows that were not fitted on, where tokens count by context (context.py). All
candidates of a round walk through the layers side by side, so that a round reads each layer once,
whatever its number of candidates.

An angular distance between streams (ShortGPT, arXiv 2403.03853) says little here: what a layer does
may be large and linear, and then the repair does it, or small and needed.

Shapes: N windows, L tokens per window, T tokens, D hidden_size, I inputs of a writer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from dotexport.axes.carrying import carry
from dotexport.axes.plan import Plan
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.layers import Layer, Stock
from dotexport.models.shapes import Sizes
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.context import context_weights
from dotexport.narrowing.judging import Head, divergences
from dotexport.narrowing.original import Original
from dotexport.narrowing.streams import check_finite, held_out_windows, inverse_rms
from dotexport.storage.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

LENGTH = 512  # of a window, the last, at most
FITTED, JUDGED = 3072, 1024  # tokens
RIDGE = 1e-3
SEARCH = "depth"  # its name in a workspace
LOOKED_AT = 6  # candidates of a round after the first: those that cost least when last measured


@dataclass
class Depths:
    """Which layers of one model stay, whatever their number: the order in which they leave is
    searched as far as it is asked for.

    Attributes:
        text: a part of it is looked at, as much of either kind.
        left: layers of the original, the first to leave first.
        divergences: held-out KL once each of them has left too, nats per token.
        workspace: keeps the search after every layer.
    """

    source: Checkpoint
    text: CalibrationText
    device: torch.device
    passes: torch.dtype = torch.float32
    progress: Progress = lambda stage, done, total: None
    left: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    workspace: Workspace = field(default_factory=Workspace)
    _costs: dict[int, float] = field(default_factory=dict)
    _made: Stack | None = None

    def __post_init__(self) -> None:
        if kept := self.workspace.load(SEARCH):
            self.left, self.divergences = kept[0]["left"], kept[0]["divergences"]
            self._costs = dict(kept[0]["costs"])

    def settled(self, decided: Plan) -> Plan:
        """The plan, with the layers that stay."""
        before = decided.before.num_layers
        count = before - decided.after.num_layers
        if count == 0:
            return decided
        self._search(decided, count)
        gone = self.left[:count]
        kept = tuple(layer for layer in range(before) if layer not in gone)
        return decided.of_layers(kept)

    @property
    def courses(self) -> Mapping[str, Callable[[Plan], Mapping[int, float]]]:
        """By axis: from a plan to what every size down to the plan's diverges by, as the search
        sees it."""
        return {"num_hidden_layers": self._course}

    def _course(self, decided: Plan) -> dict[int, float]:
        before = decided.before.num_layers
        self.settled(decided)
        counts = range(1, before - decided.after.num_layers + 1)
        return {before - count: self.divergences[count - 1] for count in counts}

    def _search(self, decided: Plan, count: int) -> None:
        """Let `count` layers leave, one after another."""
        before = decided.before.num_layers
        for number in range(len(self.left), count):
            kept = [layer for layer in range(before) if layer not in self.left]
            free = may_leave(kept, decided.before)
            ranked = sorted(free, key=lambda layer: self._costs.get(layer, 0.0))
            looked_at = ranked[:LOOKED_AT] if number else ranked

            def passed(place: int, number: int = number, layers: int = len(kept)) -> None:
                """One unit is a layer; every step that is still to come passes as many."""
                self.progress("choosing layers", number * layers + place, count * layers)

            measured = self._stack(decided).without(kept, looked_at, passed)
            base = self.divergences[-1] if number else 0.0
            self._costs |= {layer: divergence - base for layer, divergence in measured.items()}
            best = min(measured, key=measured.__getitem__)
            logger.info("without layer %d: %.4f nats of %s", best, measured[best], measured)
            self.left.append(best)
            self.divergences.append(measured[best])
            found = {"left": self.left, "divergences": self.divergences}
            self.workspace.save(SEARCH, found | {"costs": list(self._costs.items())})

    def _stack(self, decided: Plan) -> Stack:
        if self._made is None:
            before = decided.on_kept_tokens.before
            plan = replace(decided, before=before, after=before, layers=None)
            source, whole = carry(self.source, plan)
            stock = Stock.of(source.config, self.device, self.passes)
            original = Original(source, whole.family, whole.before, stock, self.device)
            self._made = Stack(original, *_parts(self.text))
        return self._made


def may_leave(kept: Sequence[int], before: Sizes) -> list[int]:
    """All but the first, and but the last of its kind."""
    kinds = [before.kind(layer) for layer in kept]
    return [
        layer
        for layer, kind in zip(kept[1:], kinds[1:], strict=True)
        if not kind or kinds.count(kind) > 1
    ]


def _parts(text: CalibrationText) -> tuple[Tensor, Tensor]:
    """Windows to fit on, and windows to judge by, as many of either kind; a single one is both."""
    short = text.last(LENGTH)
    fitted_NL, judged_NL = [], []
    for kind_NL in short.kinds:
        held = held_out_windows(len(kind_NL))
        fitted = [n for n in range(len(kind_NL)) if n not in held]
        fitted_NL.append(kind_NL[fitted[: -(-FITTED // (short.length * len(short.kinds)))]])
        judged_NL.append(kind_NL[sorted(held)[: -(-JUDGED // short.length)]])
    judged = torch.cat(judged_NL)
    return torch.cat(fitted_NL), judged if len(judged) else torch.cat(fitted_NL)


@dataclass(frozen=True)
class Stack:
    """The original's layers, and what passes between them on two sets of windows.

    Attributes:
        fitted_NL, judged_NL: tokens to fit on, and to judge by.
    """

    original: Original
    fitted_NL: Tensor
    judged_NL: Tensor

    @cached_property
    def streams(self) -> list[Tensor]:
        """What enters each layer of the original, and what leaves the last: (N, L, D), the windows
        to fit on first."""
        tokens_NL = torch.cat([self.fitted_NL, self.judged_NL]).to(self.original.device)
        streams = [self.original.embedding()[tokens_NL]]
        for number in range(self.original.sizes.num_layers):
            streams.append(self.original.layer(number).through(streams[-1]))
        check_finite(streams[-1].sum())
        return streams

    @cached_property
    def weights(self) -> Tensor:
        """How much each token that is judged by counts, (N, L)."""
        return context_weights(self.original, self.judged_NL)

    @cached_property
    def head(self) -> Head:
        return Head(self.original.stock, self.original.folded_head())

    def _judged(self, stream_NLD: Tensor) -> Tensor:
        return stream_NLD[len(self.fitted_NL) :]

    @torch.no_grad()
    def without(
        self,
        kept: Sequence[int],
        candidates: Collection[int],
        passed: Callable[[int], None] = lambda place: None,
    ) -> Mapping[int, float]:
        """Held-out KL of the layers `kept` without each of these, nats per token, by context.

        Args:
            passed: told how many of `kept` are behind.
        """
        stream_NLD = self.streams[0]
        trials: dict[int, Tensor] = {}
        ends = [*kept, self.original.sizes.num_layers]
        for place, number in enumerate(kept):
            passed(place)
            front = Front(self.original.layer(number), stream_NLD, len(self.fitted_NL))
            following = ends[place + 1 :]
            born = {}
            if following[0] in candidates:
                repaired_NLD = front.behind(self.streams[following[1]])
                born = {following[0]: self._judged(repaired_NLD)}
            stream_NLD = front.after(
                self.streams[following[0]] if following[0] != number + 1 else None
            )
            passing = {left: trial for left, trial in trials.items() if left != number}
            trials |= {left: front.layer.through(trial) for left, trial in passing.items()}
            trials |= born
        theirs_TD = self._judged(self.streams[-1]).flatten(0, 1)
        said = [(self.head, trial.flatten(0, 1)) for trial in trials.values()]
        totals = divergences((self.head, theirs_TD), said, self.weights.flatten())
        return {left: total / len(theirs_TD) for left, total in zip(trials, totals, strict=True)}


class Front:
    """A layer in front of what may leave: its last writer can be fitted to what lies behind.

    Args:
        stream_NLD: what enters it.
        fitted: how many of these windows are fitted on.
    """

    def __init__(self, layer: Layer, stream_NLD: Tensor, fitted: int) -> None:
        self.layer = layer
        *others, self.last = layer.sublayers
        for sublayer in others:
            stream_NLD = layer.after(sublayer, stream_NLD)
        self.before_NLD, self.fitted = stream_NLD, fitted

    @cached_property
    def _inside(self) -> Tensor:
        """What the writer sees, and a one where it has a bias, (N, L, I)."""
        inside_NLI = self.layer.inside(self.last, self.before_NLD)
        return pad(inside_NLI, (0, 1), value=1.0) if self._bias is not None else inside_NLI

    @property
    def _bias(self) -> Tensor | None:
        return self.layer.tensors().get(f"{self.last.writer.name}.bias")

    @property
    def _fits(self) -> bool:
        """Whether one least squares problem gives the writer: not through a norm behind it, and not
        for experts, which see different tokens."""
        return self.last.output_norm is None and self.last.router is None

    def behind(self, target_NLD: Tensor) -> Tensor:
        """The stream behind the layer once its writer is fitted to this one.

        Where none can be fitted, it stays as it is.
        """
        if not self._fits:
            return self.layer.after(self.last, self.before_NLD)
        fitted_NLD: Tensor = self.before_NLD + self._inside @ self._fitted(target_NLD).T.float()
        return fitted_NLD

    def after(self, target_NLD: Tensor | None) -> Tensor:
        """The same, and the writer is fitted from now on; None: the stream as it is."""
        if target_NLD is not None and self._fits:
            weights_DI = self._fitted(target_NLD)
            if self._bias is not None:
                self.layer.assign(f"{self.last.writer.name}.bias", weights_DI[:, -1])
                weights_DI = weights_DI[:, :-1]
            self.layer.assign(f"{self.last.writer.name}.weight", weights_DI)
        return self.layer.after(self.last, self.before_NLD)

    def _fitted(self, target_NLD: Tensor) -> Tensor:
        """As the narrowing fits writers (narrowing/site.py): each token counts by its size."""
        weights_DI = self.layer.tensor(f"{self.last.writer.name}.weight").double()
        if self._bias is not None:
            weights_DI = torch.column_stack([weights_DI, self._bias])
        some = slice(self.fitted)
        weight_NL1 = inverse_rms(target_NLD[some])
        inputs_TI = (self._inside[some] * weight_NL1).flatten(0, 1)
        missing_TD = ((target_NLD - self.before_NLD)[some] * weight_NL1).flatten(0, 1)
        moments = Moments.zeros(inputs_TI.shape[1], missing_TD.shape[1], device=inputs_TI.device)
        moments.add(inputs_TI, missing_TD)
        return ridge_solve(moments, weights_DI, RIDGE)
