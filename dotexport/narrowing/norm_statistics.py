"""What the norm sites of the original see of its residual stream: one pass over the text.

Shapes: D hidden_size, T tokens, B windows of a batch, L tokens per window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dotexport.merging.gram import gram
from dotexport.merging.ot.cost import Array
from dotexport.models.family import Sublayer
from dotexport.models.layers import Layer
from dotexport.narrowing.original import Original, metric
from dotexport.narrowing.streams import Streams, check_finite, inverse_rms

Progress = Callable[[str, int, int], None]

MOST_SITES = 8  # kept apart; neighbours beyond that share one, so memory does not grow with depth
MASSIVE = 1000.0  # times the median magnitude of a stream (Sun et al., arXiv 2402.17762)
MOST_MASSIVE = 16  # axes; real models have fewer than five
SINK = 10.0  # times the median size of a token


@dataclass
class Sight:
    """Second moments of the normalised stream, and what is done with it.

    Attributes:
        moments: per site, or for some neighbouring ones together, (D, D) in float64, trace 1.
        metrics: what the readers there do with it, sum of W^T W, (D, D).
        counts: sites in each moment.
        massive: axes of massive activations, the largest first.
        final: moment of the last site, which the head reads; also the last of `moments`.
        tied: whether that head is the embedding's table, which no refit can change.
    """

    moments: Sequence[Tensor]
    metrics: Sequence[Tensor]
    counts: Sequence[int] = ()
    massive: Sequence[int] = ()
    final: Tensor | None = None
    tied: bool = False

    def mean(self) -> Array:
        """Second moment over all sites, each counted alike.

        Weighing sites by what their readers do with them was measured and is worse (docs/log.md).
        """
        counts = list(self.counts) or [1] * len(self.moments)
        total_DD = sum(n * m_DD for n, m_DD in zip(counts, self.moments, strict=True))
        mean_DD: Array = (total_DD / sum(counts)).cpu().numpy()  # type: ignore[union-attr]
        return mean_DD

    def within(self, axes: Sequence[int]) -> Sight:
        """The same for some of the axes only."""
        some = torch.as_tensor(axes, device=self.moments[0].device)
        moments, metrics = ([m[some][:, some] for m in s] for s in (self.moments, self.metrics))
        return Sight(moments, metrics, self.counts, tied=self.tied)


@dataclass
class _Collected:
    """Sums while looking; `room` sites share one entry."""

    room: int
    moments: list[Tensor] = field(default_factory=list)
    metrics: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, moment_DD: Tensor, metric_DD: Tensor, *, apart: bool = False) -> None:
        if self.counts and self.counts[-1] < self.room and not apart:
            old = self.counts[-1]
            self.moments[-1] = (old * self.moments[-1] + moment_DD) / (old + 1)
            self.metrics[-1] = self.metrics[-1] + metric_DD
            self.counts[-1] += 1
        else:
            self.moments.append(moment_DD)
            self.metrics.append(metric_DD)
            self.counts.append(1)


def look(original: Original, streams: Streams, progress: Progress) -> Sight:
    """Run the original over the text and collect what its norm sites see.

    Every site is normalised: a sum over the raw stream would let the last layers, whose norm is 10
    to 100 times larger, own the basis. Attention sinks are left out of all sums: the first position
    and tokens many times the size of the others.
    """
    family, layers = original.family, original.sizes.num_layers
    sites = sum(len(family.in_layer(original.sizes.kind(number))) for number in range(layers))
    collected, spikes_D = _Collected(-(-sites // (MOST_SITES - 1))), torch.zeros(())
    original.enter(original.embedding(), streams)
    for number in range(layers):
        layer = original.layer(number)
        for sublayer in layer.sublayers:
            moment_DD, peaks_D = _moment(streams, partial(_seen, layer, sublayer))
            collected.add(moment_DD, layer.metric(sublayer))
            spikes_D = torch.maximum(spikes_D.to(peaks_D), peaks_D)
            streams.advance_original(partial(layer.after, sublayer))
        progress("reading the original", number + 1, layers)
    final_DD, peaks_D = _moment(streams, original.stock.norm(streams.device))
    collected.add(final_DD, metric(original.folded_head()), apart=True)
    massive = _massive(torch.maximum(spikes_D.to(peaks_D), peaks_D))
    return Sight(collected.moments, collected.metrics, collected.counts, massive, final_DD)


def _seen(layer: Layer, sublayer: Sublayer, stream_BLD: Tensor) -> Tensor:
    """What readers see, of tokens of one size; a stream that no norm is in front of, normalised."""
    seen_BLD = layer.normalise(sublayer, stream_BLD)
    return seen_BLD if sublayer.norm else seen_BLD * inverse_rms(seen_BLD)


def _moment(streams: Streams, normalise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Second moment of the normalised stream, trace 1; and per axis its largest raw value,
    in units of the stream's median magnitude in that window."""
    size = streams.original_NLD.shape[-1]
    moment_DD = torch.zeros(size, size, dtype=torch.float64, device=streams.device)
    peaks_D = torch.zeros(size, device=streams.device)
    for rows in streams.choosing():
        raw_BLD = streams.original(rows)
        magnitude_B = raw_BLD[:, :16].abs().flatten(1).median(1).values.clamp_min(1e-30)
        peaks_BD = raw_BLD.abs().amax(1) / magnitude_B[:, None]
        peaks_D = torch.maximum(peaks_D, peaks_BD.amax(0))
        size_BL = raw_BLD.square().mean(-1).sqrt()
        quiet_BL = size_BL <= SINK * size_BL.median(1, keepdim=True).values
        quiet_BL[:, 0] = False
        moment_DD += gram(normalise(raw_BLD)[quiet_BL])
    streams.processes.sum(moment_DD)
    streams.processes.largest(peaks_D)
    check_finite(moment_DD.trace())
    return moment_DD / moment_DD.trace().clamp_min(1e-30), peaks_D


def _massive(peaks_D: Tensor) -> list[int]:
    peaks = peaks_D.cpu().numpy()
    order = np.argsort(-peaks, kind="stable")[:MOST_MASSIVE]
    return [int(axis) for axis in order if peaks[axis] >= MASSIVE]
