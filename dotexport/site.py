"""One sublayer, narrowed: its readers refitted, its neurons merged, its writer refitted.

Attention and MLP are the same to this file: a norm, readers, something in between, a writer.

Shapes: T tokens, D width of the stream before, K after, N neurons inside the sublayer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dotexport.basis import METHODS
from dotexport.errors import UsageError
from dotexport.families import Sublayer
from dotexport.layers import Layer
from dotexport.merge import MERGE_LEVELS, Merge, barycentres, choose, transport
from dotexport.ot.coupling import Coupling, TransportOptions
from dotexport.refit import Fit, Moments, compensate, fit
from dotexport.streams import Rows, Streams

MLP_METHODS = ("dot", "obs", "select")


@dataclass(frozen=True, kw_only=True)
class NarrowOptions:
    """How neurons are merged.

    Attributes:
        basis: of the residual stream, one of `dot`, `pca`, `select`.
        mlp: `dot` (OBS chooses the targets, transport merges the rest into them), `obs` (the
            choice alone), `select` (largest magnitude). Without refit nothing can judge a merge,
            and `dot` is `obs`.
        refit: closed-form least squares against the original's activations, layer after layer.
        transport: how plans are found.
        seed: which calibration windows are held out to choose ridges and accept merges.
    """

    basis: str = "pca"
    mlp: str = "dot"
    refit: bool = True
    transport: TransportOptions = field(default_factory=TransportOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mlp not in MLP_METHODS:
            raise UsageError(f"mlp must be one of {', '.join(MLP_METHODS)}, not {self.mlp!r}")
        if self.basis not in METHODS:
            raise UsageError(f"basis must be one of {', '.join(METHODS)}, not {self.basis!r}")
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}")


@dataclass
class Site:
    """A sublayer of teacher and student, and the streams that enter both.

    Attributes:
        E_DK: basis of the residual stream.
        scale: sqrt(D / K), which the readers carry for the narrower norm.
        width: neurons inside the sublayer after narrowing.
        gated: the reader behind a nonlinearity, which takes no signs.
    """

    sublayer: Sublayer
    teacher: Layer
    student: Layer
    streams: Streams
    E_DK: Tensor
    scale: float
    width: int
    gated: str
    options: NarrowOptions

    def narrow(self) -> Iterator[dict[str, Any]]:
        """Refit, merge, refit, and move both streams behind this sublayer; yields reports."""
        if self.options.refit:
            yield {"site": self.sublayer.norm, **self._refit_readers().as_dict()}
        report = {"site": self.sublayer.writer.name}
        fitted, merge, coupling = self._narrow_inside()
        self.student.assign(self._writer, fitted.weights_OI)
        yield report | fitted.as_dict() | _merge_report(merge, coupling)
        self.streams.advance_original(lambda x: self.teacher.after(self.sublayer, x))
        self.streams.advance_narrowed(lambda r: self.student.after(self.sublayer, r))

    # Readers ----------------------------------------------------------------------------------

    def _refit_readers(self) -> Fit:
        """x ~ P y: what the original's readers saw, from what the narrow stream still says."""
        train, held = self.streams.moments(
            lambda rows: (
                self.student.normalise(self.sublayer, self.streams.narrowed(rows)),
                self.teacher.normalise(self.sublayer, self.streams.original(rows)),
            ),
            metric_OO=self.teacher.metric(self.sublayer),
        )
        projection = fit(train, held, self.E_DK * self.scale)
        for linear in self.sublayer.readers:
            name = f"{linear.name}.weight"
            weight_OD = self.teacher.tensor(name).double()
            self.student.assign(name, weight_OD @ projection.weights_OI)
        return projection

    # Neurons and writer -----------------------------------------------------------------------

    @property
    def _writer(self) -> str:
        return f"{self.sublayer.writer.name}.weight"

    def _narrow_inside(self) -> tuple[Fit, Merge | None, Coupling | None]:
        analytic_KN = self.student.tensor(self._writer).double()
        train, held = self._writer_moments(analytic_KN)
        if self.width == analytic_KN.shape[1]:
            return self._fit(train, held, analytic_KN), None, None
        everything = train + held
        kept = choose(self.options.mlp, everything, analytic_KN, self.width)
        prior = analytic_KN[:, kept]
        if self.options.mlp != "select":
            prior = compensate(train, analytic_KN, kept)
        chosen = self._fit(train.of(kept), held.of(kept), prior)
        rows = {name: self.student.tensor(name) for name in self._reader_names()}
        alone = Merge.nothing(kept, analytic_KN.shape[1])
        self._apply(alone, rows)
        if self.options.mlp != "dot" or not self.options.refit:
            return chosen, alone, None
        coupling = transport(everything, analytic_KN, kept, self.options.transport)
        return *self._best_merge(everything, coupling, alone, chosen, prior, rows), coupling

    def _writer_moments(self, analytic_KN: Tensor) -> tuple[Moments, Moments]:
        """With refit, the target is E^T X+ - r: the writer also repairs earlier drift.

        Without, it is what the analytic writer would have added. Each token counts by one over the
        mean square of X+, because the next norm will divide by it: else the few positions with
        massive activations would decide the fit.
        """
        bias = self.student.tensors().get(f"{self.sublayer.writer.name}.bias", 0.0)

        def read(rows: Rows) -> tuple[Tensor, Tensor]:
            original_BLD, narrowed_BLK = self.streams.original(rows), self.streams.narrowed(rows)
            after_BLD = self.teacher.after(self.sublayer, original_BLD).double()
            weight_BL1 = after_BLD.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            inside_BLN = self.student.inside(self.sublayer, narrowed_BLK).double()
            if self.options.refit:
                target_BLK = after_BLD @ self.E_DK - narrowed_BLK - bias
            else:
                target_BLK = inside_BLN @ analytic_KN.T
            return inside_BLN * weight_BL1, target_BLK * weight_BL1

        return self.streams.moments(read)

    def _fit(self, train: Moments, held: Moments, prior_KN: Tensor) -> Fit:
        if self.options.refit:
            return fit(train, held, prior_KN)
        return Fit.unchanged(prior_KN, held)

    # Merging ----------------------------------------------------------------------------------

    def _best_merge(
        self,
        moments: Moments,
        coupling: Coupling,
        alone: Merge,
        chosen: Fit,
        prior_KN: Tensor,
        rows: dict[str, Tensor],
    ) -> tuple[Fit, Merge]:
        """Move removed neurons into kept ones as far as held-out reconstruction improves.

        Every candidate starts from the prior of the choice alone, which has not seen the held-out
        windows: from the fitted writer, any candidate would look better than it is.
        """
        best, accepted = chosen, alone
        tried = 0.0
        for level in MERGE_LEVELS:
            merge = barycentres(moments, coupling, alone.kept, least_cosine=level)
            if merge.moved == tried:
                continue
            tried = merge.moved
            self._apply(merge, rows)
            train, held = self._writer_moments(prior_KN)
            candidate = fit(train, held, prior_KN)
            if candidate.error < best.error:
                best, accepted = candidate, merge
        self._apply(accepted, rows)
        return best, accepted

    def _reader_names(self) -> list[str]:
        parts = ("weight", "bias")
        names = [f"{linear.name}.{part}" for linear in self.sublayer.readers for part in parts]
        return [name for name in names if name in self.student.tensors()]

    def _apply(self, merge: Merge, rows: dict[str, Tensor]) -> None:
        for name, row_NX in rows.items():
            gated = name.startswith(f"{self.gated}.")
            mix_KN = merge.gate_KN if gated else merge.up_KN
            self.student.assign(name, mix_KN.to(row_NX.device) @ row_NX.double())


def _merge_report(merge: Merge | None, coupling: Coupling | None) -> dict[str, Any]:
    if merge is None:
        return {}
    report: dict[str, Any] = {"kept": len(merge.kept), "moved_mass": merge.moved}
    return report | (coupling.as_dict() if coupling else {})
