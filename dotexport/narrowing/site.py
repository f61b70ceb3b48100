"""One sublayer, narrowed: its readers refitted, its neurons merged, its writer refitted.

Attention and MLP are the same to this file: a norm, readers, something in between, a writer. What
leaves is a KV group in the one and a neuron in the other.

Shapes: T tokens, D width of the stream before, K after, N neurons inside the sublayer, I = N, or
N + 1 where a writer with a bias sees a last input of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as apply_linear
from torch.nn.functional import pad

from dotexport.merging.gram import gram
from dotexport.merging.ot.coupling import Coupling, Summary
from dotexport.merging.refit import Fit, Moments, compensate, fit, gain_solver
from dotexport.merging.units import Choice, Units
from dotexport.models.family import HEADS, Linear, Sublayer
from dotexport.models.layers import PARTS, Layer
from dotexport.narrowing import local
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.output_norm import Behind, FewerFeatures, size
from dotexport.narrowing.streams import Rows, Step, Streams, inverse_rms, onto

REWEIGHINGS = 3  # of a writer behind which a norm lies, at most


@dataclass(frozen=True)
class Settled:
    """A writer, and the gamma of the norm behind it as the diagonal of a fit."""

    weights_KI: Tensor
    gamma: Fit


def new_rows(choice: Choice, linear: Linear, rows_NX: Tensor, *, gated: str | None) -> Tensor:
    """Of a reader, by the space that each of the matrices fused in it writes into; these are as
    wide as one another."""
    spaces = list(linear.outs)
    if linear.name == gated:
        spaces[0] = "gate"
    parts = rows_NX.chunk(len(spaces))
    return torch.cat([choice.rows(*part) for part in zip(spaces, parts, strict=True)])


@dataclass
class Site:
    """A sublayer of teacher and student, and the streams that enter both.

    Attributes:
        E_DK: basis of the residual stream.
        scale: sqrt(D / K), which the readers carry for the narrower norm.
        width: neurons inside the sublayer after narrowing.
        gated: the reader behind a nonlinearity, which takes no signs.
        units: how what leaves is arranged inside the sublayer.
        method: which of them stay, and whether the others are merged into them.
        pass_over: moves the original's stream behind what follows this sublayer and is not written.
    """

    sublayer: Sublayer
    teacher: Layer
    student: Layer
    streams: Streams
    E_DK: Tensor
    scale: float
    width: int
    gated: str | None
    units: Units
    method: str
    options: NarrowOptions
    pass_over: Callable[[], None] = lambda: None

    def narrow(self) -> Iterator[dict[str, Any]]:
        """Refit, merge, refit, heal, and move both streams behind this sublayer; yields reports."""
        if self.options.refit:
            seen = self.sublayer.norm or f"{self.sublayer.module}, as it is"
            yield {"site": seen, **self._refit_readers().as_dict()}
        self.streams.advance_original(partial(self.teacher.after, self.sublayer))
        self.teacher.forget(self.sublayer)
        self.pass_over()
        yield from self._narrow_writers()
        if self.options.local and self.options.refit and self._worth_healing:
            yield {"site": self.sublayer.module, **self._heal(self.options.local).as_dict()}
        self.streams.advance_narrowed(partial(self.student.after, self.sublayer))

    # Readers ----------------------------------------------------------------------------------

    def _refit_readers(self) -> Fit:
        """x ~ P y + c: what the original's readers saw, from what the narrow stream still says."""
        ones = self._readers_have_biases

        def read(rows: Rows) -> tuple[Tensor, Tensor]:
            y_BLK = self.student.normalise(self.sublayer, self.streams.narrowed(rows))
            x_BLD = self.teacher.normalise(self.sublayer, self.streams.original(rows))
            y_BLI = pad(y_BLK, (0, 1), value=1.0) if ones else y_BLK
            if self.sublayer.norm is None:  # tokens count alike, whatever their size
                weight_BL1 = inverse_rms(x_BLD)
                return y_BLI * weight_BL1, x_BLD * weight_BL1
            return y_BLI, x_BLD

        train, held = self.streams.moments(read, metric_OO=self.teacher.metric(self.sublayer))
        prior_DI = pad(self.E_DK * self.sublayer.gain(self.scale), (0, int(ones)))
        projection = self._fitted(train, held, prior_DI)
        inner_scale = self.student.family.inner_scale(self.scale)
        for linear in self.sublayer.all_readers:
            map_DI = projection.weights_OI * self.sublayer.inner_gain(linear, inner_scale)
            for one in self.student.names(linear):
                name, bias = f"{one}.weight", f"{one}.bias"
                seen_OI = self.teacher.tensor(name).double() @ map_DI
                self.student.assign(name, seen_OI[:, : self.E_DK.shape[1]])
                if ones:
                    self.student.assign(bias, self.student.tensor(bias) + seen_OI[:, -1])
        return projection

    def _fitted(self, *asked: Any, **how: Any) -> Fit:
        """`fit`, by one process for all."""
        ridge = self.options.ridge
        return self.streams.processes.agreed(lambda: fit(*asked, ridge=ridge, **how))

    @property
    def _readers_have_biases(self) -> bool:
        readers = self.sublayer.all_readers
        names = (one for linear in readers for one in self.student.names(linear))
        return all(f"{name}.bias" in self.student.tensors() for name in names)

    # Neurons and writer -----------------------------------------------------------------------

    def _narrow_writers(self) -> Iterator[dict[str, Any]]:
        fitted, prior_KI, report = self._narrow_inside()
        self._assign_writer(fitted.weights_OI)
        yield {"site": self.sublayer.writer.name, **fitted.as_dict(), **report}
        if self.sublayer.output_norm and self.options.refit and self.options.feedback:
            settled = self._reweigh([prior_KI, fitted.weights_OI])
            yield {"site": self.sublayer.output_norm, **settled.gamma.as_dict()}

    @cached_property
    def _goal(self) -> Step:
        """E^T x, times the gain of the narrower stream, for tokens x of the original's."""
        return onto(self.E_DK * self.student.family.stream_gain(self.scale))

    @property
    def _bias(self) -> Tensor | None:
        return self.student.tensors().get(f"{self.sublayer.writer.name}.bias")

    @property
    def _behind(self) -> Behind | None:
        """The norm behind the writer, whose gamma is then folded into all that is fitted."""
        if self.sublayer.output_norm is None:
            return None
        gamma_K = self.student.gamma(self.sublayer.output_norm)
        return Behind(gamma_K, self.student.stock.epsilon)

    def _analytic_writer(self) -> Tensor:
        """E^T W, and E^T b as the last column where there is a bias."""
        weight_KN = self.student.tensor(f"{self.sublayer.writer.name}.weight")
        if self._bias is not None:
            weight_KN = torch.column_stack([weight_KN, self._bias])
        return self._behind.folded(weight_KN.double()) if self._behind else weight_KN

    def _unfolded(self, weights_KI: Tensor) -> Tensor:
        return self._behind.unfolded(weights_KI) if self._behind else weights_KI

    def _assign_writer(self, weights_KI: Tensor) -> None:
        self._assign_unfolded(self._unfolded(weights_KI))

    def _assign_unfolded(self, weights_KI: Tensor) -> None:
        name = self.sublayer.writer.name
        if self._bias is not None:
            self.student.assign(f"{name}.bias", weights_KI[:, -1])
            weights_KI = weights_KI[:, :-1]
        self.student.assign(f"{name}.weight", weights_KI)

    def _narrow_inside(self) -> tuple[Fit, Tensor, dict[str, Any]]:
        """The fitted writer, the weights it would fall back on, and a report."""
        analytic_KI = self._analytic_writer()
        train, held = self._writer_moments(analytic_KI)
        width = analytic_KI.shape[1] - (self._bias is not None)
        if self.width == width:
            return self._fit(train, held, analytic_KI), analytic_KI, {}
        choice, coupling, candidates = self._choose(train + held, analytic_KI[:, :width])
        kept = choice.kept if self._bias is None else pad(choice.kept, (0, 1), value=width)
        prior = partial(self._fall_back, train, analytic_KI, kept)
        prior_KI = self.streams.processes.agreed(prior)
        del prior
        train, held = train.of(kept), held.of(kept)
        fitted = self._fit(train, held, prior_KI)
        del train, held  # those of a merge need their room
        rows = {name: self.student.tensor(name) for _, name in self._reader_rows()}
        self._shorten_untouched(choice)
        self._shorten_inner_norms(choice)
        self._apply(choice, rows)
        if self.options.refit:
            fitted, choice = self._best_merge(candidates, choice, fitted, prior_KI, rows)
        report = {"kept": self._count(choice), "moved_mass": choice.moved}
        return fitted, prior_KI, report | (coupling.as_dict() if coupling else {})

    def _fall_back(self, train: Moments, analytic_KI: Tensor, kept: Tensor) -> Tensor:
        """Weights of the kept ones; a choice by magnitude knows nothing of those that leave."""
        by_magnitude = self.method == "select"
        return analytic_KI[:, kept] if by_magnitude else compensate(train, analytic_KI, kept)

    def _choose(
        self, moments: Moments, writer_KN: Tensor
    ) -> tuple[Choice, Coupling | Summary | None, Iterable[Choice]]:
        """The units that stay, and merges of the others into them from strict to loose."""
        if self._bias is not None:
            moments = moments.given_last()
        count, processes = self.width // self.units.width, self.streams.processes
        kept = processes.agreed(lambda: self.units.choose(self.method, moments, writer_KN, count))
        alone = self.units.alone(kept)
        if not (self.method == "dot" and self.options.refit):
            return alone, None, ()
        keys_NN = None if self.units.tokenwise else self._key_moment()
        if not processes.leads:
            return alone, None, ()
        transport = self.options.transport
        return alone, *self.units.merges(moments, writer_KN, kept, transport, keys_NN)

    def _key_moment(self) -> Tensor:
        """Second moment of the narrowed model's keys before rotation."""
        name = next(linear.name for linear in self.sublayer.readers if linear.out == "kv")
        weight_NK = self.student.tensor(f"{name}.weight").double()
        width = weight_NK.shape[1]
        total_KK = torch.zeros(width, width, dtype=torch.float64, device=weight_NK.device)
        for rows in self.streams.choosing():
            normed_BLK = self.student.normalise(self.sublayer, self.streams.narrowed(rows))
            total_KK += gram(normed_BLK.flatten(0, 1))
        self.streams.processes.sum(total_KK)
        return weight_NK @ total_KK @ weight_NK.T

    def _count(self, choice: Choice) -> int:
        return len(choice.kept) // self.units.width

    def _writer_moments(self, analytic_KI: Tensor) -> tuple[Moments, Moments]:
        """With error feedback the target is E^T X+ - r: the writer also repairs earlier drift.

        Without, it is what the analytic writer would have added. Each token counts by one over the
        mean square of X+, because the next norm will divide by it: else the few positions with
        massive activations would decide the fit. Behind a norm, inputs are divided by what that
        divides by, with the analytic weights in front of it.
        """

        def read(rows: Rows) -> tuple[Tensor, Tensor]:
            inside_BLI, target_BLK, weight_BL1 = self._asked_of_writer(rows)
            if self._behind:
                inside_BLI = self._behind.spread(inside_BLI, analytic_KI)
            if not (self.options.refit and self.options.feedback):
                target_BLK = inside_BLI @ analytic_KI.T.float()
            return inside_BLI * weight_BL1, target_BLK * weight_BL1

        return self.streams.moments(read)

    def _asked_of_writer(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """What it sees, what is missing behind it, and how much each token counts."""
        after_BLD, before_BLK = self.streams.original(rows), self.streams.narrowed(rows)
        beside = self.streams.beside_narrowed.of(rows)
        inside_BLI = self.student.inside(self.sublayer, before_BLK, beside)
        if self._bias is not None:
            inside_BLI = pad(inside_BLI, (0, 1), value=1.0)
        goal_BLK = self.student.unscaled(self.sublayer, self._goal(after_BLD))
        return inside_BLI, goal_BLK - before_BLK, inverse_rms(after_BLD)

    def _fit(self, train: Moments, held: Moments, prior_KI: Tensor) -> Fit:
        if not self.options.refit:
            return Fit.unchanged(prior_KI, held)
        fitted = self._fitted(train, held, prior_KI)
        if self._behind is None:
            return fitted
        weights_KI = self._behind.where_it_matters(fitted.weights_OI, prior_KI.double())
        return replace(fitted, weights_OI=weights_KI)

    # A norm behind the writer -----------------------------------------------------------------

    def _reweigh(self, folded: Sequence[Tensor]) -> Settled:
        """Fit gamma for each of these writers, then writers again from the best of them.

        A writer is fitted for sizes that it then changes. The error of gamma's fit is that of what
        the sublayer really gives: by it the best is taken.
        """
        behind = self._behind
        assert behind is not None
        found = [self._settle(behind.unfolded(weights_KI)) for weights_KI in folded]
        unsettled = found[0].gamma.analytic_error
        best = min(found, key=lambda settled: settled.gamma.error)
        for _ in range(REWEIGHINGS):
            self._assign_settled(best)
            folded_KI = self._analytic_writer()
            fitted = self._fit(*self._writer_moments(folded_KI), folded_KI)
            again = self._settle(self._unfolded(fitted.weights_OI))
            if not again.gamma.error < best.gamma.error:
                break
            best = again
        self._assign_settled(best)
        return replace(best, gamma=replace(best.gamma, analytic_error=unsettled))

    def _settle(self, weights_KI: Tensor) -> Settled:
        """The gamma that is best behind these weights, starting at the one that is there."""
        name, behind = self.sublayer.output_norm, self._behind
        assert name is not None
        assert behind is not None

        def read(rows: Rows) -> tuple[Tensor, Tensor]:
            inside_BLI, target_BLK, weight_BL1 = self._asked_of_writer(rows)
            written_BLK = inside_BLI @ weights_KI.T.float()
            normed_BLK = written_BLK / size(written_BLK, behind.epsilon)
            return normed_BLK * weight_BL1, target_BLK * weight_BL1

        gamma_KK = behind.gamma_K.double().diag()
        solver = partial(gain_solver, map_OI=torch.eye(len(gamma_KK)).to(gamma_KK))
        fitted = self._fitted(*self.streams.moments(read), gamma_KK, solver=solver)
        return Settled(weights_KI, fitted)

    def _assign_settled(self, settled: Settled) -> None:
        assert self.sublayer.output_norm is not None
        self._assign_unfolded(settled.weights_KI)
        self.student.assign_gamma(self.sublayer.output_norm, settled.gamma.weights_OI.diagonal())

    def _shorten_untouched(self, choice: Choice) -> None:
        """What lies between readers and writer, for the inputs of the writer that stay, or for
        their heads."""
        inside = self.sublayer.writer.in_
        spaces = (inside, HEADS) if inside == "query" else (inside,)
        for space in spaces:
            for other in self.sublayer.untouched:
                if other.shape[0] == space:
                    stay = self.student.tensor(other.name)[choice.stays(space)]
                    self.student.assign(other.name, stay)

    def _shorten_inner_norms(self, choice: Choice) -> None:
        """Norms over all queries or keys, for those that stay."""
        for norm in self.sublayer.inner_norms:
            if norm.per_head:
                continue
            linear = next(x for x in self.sublayer.readers if x.name == norm.reader)
            weight = self.student.tensor(f"{linear.name}.weight")
            bias = self.student.tensors().get(f"{linear.name}.bias")
            shorter = FewerFeatures(
                self.student.gamma(norm.name),
                choice.stays(linear.out),
                self.student.stock.epsilon,
            )
            for rows in self.streams.choosing():
                normed_BLK = self.student.normalise(self.sublayer, self.streams.narrowed(rows))
                shorter.add(apply_linear(normed_BLK, weight, bias).flatten(0, 1))
            self.streams.processes.sum(shorter.both_S, shorter.own_S)
            self.student.assign_gamma(norm.name, shorter.fitted())

    # Merging ----------------------------------------------------------------------------------

    def _best_merge(
        self,
        candidates: Iterable[Choice],
        accepted: Choice,
        best: Fit,
        prior_KI: Tensor,
        rows: dict[str, Tensor],
    ) -> tuple[Fit, Choice]:
        """Move removed units into kept ones as far as held-out reconstruction improves.

        Every candidate starts from the prior of the choice alone, which has not seen the held-out
        windows: from the fitted writer, any candidate would look better than it is.
        """
        for candidate in self.streams.processes.handed_on(candidates):
            self._apply(candidate, rows)
            train, held = self._writer_moments(prior_KI)
            fitted = self._fit(train, held, prior_KI)
            if fitted.error < best.error:
                best, accepted = fitted, candidate
        self._apply(accepted, rows)
        return best, accepted

    def _reader_rows(self) -> Iterator[tuple[Linear, str]]:
        held = self.student.tensors()
        for linear in self.sublayer.all_readers:
            for one in self.student.names(linear):
                for name in (f"{one}.weight", f"{one}.bias"):
                    if name in held:
                        yield linear, name

    def _apply(self, choice: Choice, rows: dict[str, Tensor]) -> None:
        for linear, name in self._reader_rows():
            self.student.assign(name, new_rows(choice, linear, rows[name], gated=self.gated))

    # Healing ----------------------------------------------------------------------------------

    @property
    def _worth_healing(self) -> bool:
        """Attention that lost no group gains next to nothing (docs/log.md)."""
        return self.units.tokenwise or self.width < self.units.count * self.units.width

    @property
    def _healed_norms(self) -> Iterator[str]:
        """Those that no reader takes over, and that change with the widths."""
        yield from (norm.name for norm in self.sublayer.inner_norms if not norm.per_head)
        yield from filter(None, [self.sublayer.output_norm])

    def _heal(self, options: LocalOptions) -> local.Healed:
        names = [name for _, name in self._reader_rows()]
        writers = [one for each in self.sublayer.writers for one in self.student.names(each)]
        own = [f"{writer}.{part}" for writer in writers for part in PARTS]
        names += [name for name in own if name in self.student.tensors()]
        names += [f"{norm}.weight" for norm in self._healed_norms]
        leaves = self.student.leaves(names)
        healed = local.heal(
            leaves,
            lambda r: self.student.after(self.sublayer, r),
            self.streams,
            self._goal,
            options,
            tokenwise=self.units.tokenwise,
            seed=self.options.seed,
        )
        for name, leaf in zip(names, leaves, strict=True):
            self.student.assign(name, leaf.detach())
        return healed
