"""A mixture of experts, narrowed: experts leave, those that stay get fewer neurons, and writers are
refitted one after another on the tokens that go to them.

Which experts stay is said by REAP, router-weighted expert activation pruning (Lasby et al., arXiv
2510.13999, equation 9): the saliency of expert j is the mean of g_j(x) |f_j(x)| over the tokens x
that go to it, g its gate and f its output. Nothing is renormalised that the class does not
normalise itself. A shared expert, to which all tokens go, stays with all of its neurons.

What all writers of a mixture add up to has one target, E^T X+ - r, as for every other writer.
Together they would be one least squares problem with E I unknowns in a row, whose Gram matrix no
memory holds; so one expert after another answers for what all others leave (block coordinate
descent, Gauss-Seidel): a step that is not made where it costs held-out windows more, so that no
step makes their sum worse.

Shapes: N windows, L tokens per window, T tokens of a batch that go to one expert, E experts, D
width of the stream before, K after, I neurons of an expert, and one more where a writer with a
bias sees a last input of ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dotexport.merging.refit import compensate
from dotexport.models.family import Sublayer
from dotexport.models.layers import PARTS, Layer
from dotexport.models.routing import SHARED, Routing
from dotexport.narrowing.site import Site
from dotexport.narrowing.streams import Rows, Streams, inverse_rms


def saliencies(layer: Layer, sublayer: Sublayer, streams: Streams) -> Tensor:
    """Of every expert the mean of gate times size of output over its tokens, (E,); 0 without any.

    All windows that may choose count, as for the choice of neurons and KV groups.
    """
    sums_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=streams.device)
    counts_E = torch.zeros_like(sums_E)
    for rows in streams.choosing():
        normed_TD = layer.normalise(sublayer, streams.original(rows)).flatten(0, 1)
        routing = layer.route(sublayer, normed_TD)
        for expert in range(layer.num_experts):
            tokens_T, gates_T1 = routing.to(expert)
            inside_TI = layer.inside_expert(sublayer, expert, normed_TD[tokens_T])
            given_TD = layer.write_expert(sublayer, expert, inside_TI)
            sums_E[expert] += (gates_T1[:, 0] * given_TD.norm(dim=-1)).double().sum()
            counts_E[expert] += len(tokens_T)
    streams.processes.sum(sums_E, counts_E)
    return sums_E / counts_E.clamp_min(1)


@dataclass
class ExpertSite(Site):
    """A mixture of teacher and student, and the streams that enter both.

    Attributes:
        num_experts: after narrowing.
        width: neurons inside each expert after narrowing.
    """

    num_experts: int = field(kw_only=True)

    def narrow(self) -> Iterator[dict[str, Any]]:
        """As for any sublayer; which experts stay is asked of the original before its stream moves
        on."""
        self._kept_E = self._chosen()
        yield from super().narrow()

    def _chosen(self) -> Tensor:
        """Experts that stay, ascending; of equal ones the first."""
        count = self.teacher.num_experts
        if self.num_experts == count:
            return torch.arange(count)
        saliency_E = saliencies(self.teacher, self.sublayer, self.streams).cpu()
        order_E = torch.argsort(saliency_E, descending=True, stable=True)
        kept_E = order_E[: self.num_experts].sort().values
        return self.streams.processes.agreed(lambda: kept_E)

    def _narrow_writers(self) -> Iterator[dict[str, Any]]:
        wanted_NLK = self._wanted()
        self.student.keep_experts(self.sublayer, self._kept_E)
        energy = self._held_out_energy(wanted_NLK) or 1.0
        routings = self._routings()
        numbers = self.student.experts(self.sublayer)
        every = [_Expert(self, number, routings) for number in numbers]
        lacking_NLK = wanted_NLK  # in its place, expert by expert
        for expert in every:
            expert.give(lacking_NLK, -1)
        analytic = self._held_out_energy(lacking_NLK) / energy
        for expert in every:
            expert.give(lacking_NLK, 1)
            expert.narrow(lacking_NLK)
            expert.give(lacking_NLK, -1)
        report: dict[str, Any] = {"site": f"{self.sublayer.module}.experts"}
        report |= {"error": self._held_out_energy(lacking_NLK) / energy, "analytic_error": analytic}
        if self.num_experts < self.teacher.num_experts:
            report["experts"] = self._kept_E.tolist()
        yield report

    def _wanted(self) -> Tensor:
        """What all experts together are to add, (N, L, K): with error feedback E^T X+ - r, without
        it what the analytic ones would."""
        streams, fed_back = self.streams, self.options.refit and self.options.feedback
        wanted_NLK = torch.empty_like(streams.narrowed_NLK)
        for rows in streams.batches():
            before_BLK = streams.narrowed(rows)
            if fed_back:
                after_BLK = self._goal(streams.original(rows))
            else:
                after_BLK = self.student.after(self.sublayer, before_BLK)
            wanted_NLK[rows] = (after_BLK - before_BLK).to(wanted_NLK.device)
        return wanted_NLK

    def _routings(self) -> dict[int, Routing]:
        """First window of a batch -> where its tokens go."""
        student, streams = self.student, self.streams
        found = {}
        for rows in streams.batches():
            normed_BLK = student.normalise(self.sublayer, streams.narrowed(rows))
            found[rows.start] = student.route(self.sublayer, normed_BLK.flatten(0, 1))
        return found

    def _held_out_energy(self, stream_NLK: Tensor) -> float:
        """Mean over held-out tokens of |t|^2 / rms(X+)^2, either kind of text counting alike."""

        def read(rows: Rows) -> tuple[Tensor, Tensor]:
            weight_BL1 = inverse_rms(self.streams.original(rows))
            return torch.zeros_like(weight_BL1), stream_NLK[rows].to(weight_BL1) * weight_BL1

        return self.streams.moments(read)[1].energy


@dataclass(frozen=True)
class _Expert:
    """One expert of the narrowed mixture, and the tokens that go to it."""

    site: ExpertSite
    number: int
    routings: Mapping[int, Routing]

    @property
    def _writer(self) -> str:
        return self.site.student.writer_of(self.site.sublayer, self.number)

    @property
    def _bias(self) -> Tensor | None:
        return self.site.student.tensors().get(f"{self._writer}.bias")

    def _weights(self) -> Tensor:
        """Of its writer, with a bias as the last column."""
        weight_KI = self.site.student.tensor(f"{self._writer}.weight").double()
        bias_K = self._bias
        return weight_KI if bias_K is None else torch.column_stack([weight_KI, bias_K.double()])

    def _assign(self, weights_KI: Tensor) -> None:
        if self._bias is not None:
            self.site.student.assign(f"{self._writer}.bias", weights_KI[:, -1])
            weights_KI = weights_KI[:, :-1]
        self.site.student.assign(f"{self._writer}.weight", weights_KI)

    def give(self, stream_NLK: Tensor, sign: int) -> None:
        """Add what it gives to a stream, or take it away."""
        site = self.site
        for rows in site.streams.batches():
            tokens_T, inside_TI, gates_T1 = self._inside(rows)
            given_TK = site.student.write_expert(site.sublayer, self.number, inside_TI)
            flat_TK = stream_NLK[rows].flatten(0, 1)  # of the same memory
            given_TK = (given_TK * (sign * gates_T1)).to(flat_TK)
            flat_TK.index_add_(0, tokens_T.to(flat_TK.device), given_TK)

    def narrow(self, wanted_NLK: Tensor) -> None:
        """Choose neurons, and fit the writer to what is wanted of it."""
        site = self.site
        writer_KI, has_bias = self._weights(), self._bias is not None
        width = writer_KI.shape[1] - has_bias
        train, held = site.streams.moments(partial(self._asked, wanted_NLK))
        if self.number == SHARED or site.width == width:
            self._assign(site._fit(train, held, writer_KI).weights_OI)
            return
        # Without a token, neurons are all alike.
        method = site.method if train.count + held.count else "select"
        moments = (train + held).given_last() if has_bias else train + held
        chosen = partial(site.units.choose, method, moments, writer_KI[:, :width], site.width)
        neurons = site.streams.processes.agreed(chosen)
        kept = pad(neurons, (0, 1), value=width) if has_bias else neurons
        by_magnitude = method == "select"
        prior_KI = site.streams.processes.agreed(
            lambda: writer_KI[:, kept] if by_magnitude else compensate(train, writer_KI, kept)
        )
        self._keep_rows(neurons)
        self._assign(site._fit(train.of(kept), held.of(kept), prior_KI).weights_OI)

    def _keep_rows(self, neurons: Tensor) -> None:
        """Of the readers."""
        tensors = self.site.student.tensors()
        for linear in self.site.sublayer.readers:
            for part in PARTS:
                name = f"{linear.name.format(self.number)}.{part}"
                if linear.each and name in tensors:
                    self.site.student.assign(name, tensors[name][neurons])

    def _asked(self, wanted_NLK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """What its writer sees, by its gate, and what is wanted of it, each token by its size."""
        tokens_T, inside_TI, gates_T1 = self._inside(rows)
        if self._bias is not None:
            inside_TI = pad(inside_TI, (0, 1), value=1.0)
        weight_T1 = inverse_rms(self._at(self.site.streams.original_NLD, rows, tokens_T))
        wanted_TK = self._at(wanted_NLK, rows, tokens_T)
        return (inside_TI * gates_T1 * weight_T1)[None], (wanted_TK * weight_T1)[None]

    def _inside(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Its tokens among those of some windows, its neurons there, (T, I), and its gates."""
        site = self.site
        tokens_T, gates_T1 = self.routings[rows.start].to(self.number)
        stream_TK = self._at(site.streams.narrowed_NLK, rows, tokens_T)
        normed_TK = site.student.normalise(site.sublayer, stream_TK)
        inside_TI = site.student.inside_expert(site.sublayer, self.number, normed_TK)
        return tokens_T, inside_TI, gates_T1

    def _at(self, stream_NLX: Tensor, rows: Rows, tokens_T: Tensor) -> Tensor:
        """These tokens of some windows, on the device."""
        flat_TX = stream_NLX[rows].flatten(0, 1)
        return flat_TX[tokens_T.to(flat_TX.device)].to(self.site.streams.device)
