"""The narrowing itself: a basis, and one layer after another merged and refitted.

Teacher (the original) and student (what becomes narrower) walk through the calibration text side
by side, one layer of each in memory at a time.

Shapes: N windows, L tokens per window, B windows of a batch, D width before, K width after,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dotexport.axes import cutting
from dotexport.axes.plan import Plan
from dotexport.merging.heads import Groups
from dotexport.merging.neurons import Channels
from dotexport.merging.refit import Solver, fit, gain_solver, ridge_solver
from dotexport.merging.units import Units
from dotexport.models.checkpoint import TensorSpec
from dotexport.models.exact_norm import exact_norm
from dotexport.models.family import Sublayer
from dotexport.models.layers import Layer, Stock
from dotexport.models.shapes import Sizes
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.basis_search import BasisSearch
from dotexport.narrowing.experts import ExpertSite
from dotexport.narrowing.judging import Cost, Head, costs_of
from dotexport.narrowing.layer_inputs import narrowed_inputs, projection_map
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.original import ROWS, Original, embed, metric
from dotexport.narrowing.output_norm import merged
from dotexport.narrowing.site import Site
from dotexport.narrowing.streams import Streams
from dotexport.processes.processes import Processes
from dotexport.storage.workspace import Workspace

logger = logging.getLogger(__name__)

# Tokens to fit on where several sizes are measured before one is taken, at least, and per axis of
# the stream.
REHEARSED, REHEARSED_PER_AXIS = 4096, 8
CLOSER = 4  # times as much text, for the last few sizes: a wide writer gains more by it than others
REHEARSED_LENGTH = 512  # of their windows, the last, at most
COMPARED = 64  # the same for several bases, which are closer together than sizes
EMBEDDING, HEAD = "embedding", "head"  # steps before and behind the layers


class Writer(Protocol):
    """Takes every tensor as soon as it is final."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def write(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Nowhere:
    """A writer that keeps nothing: for what is only measured."""

    specs: Mapping[str, TensorSpec]

    def write(self, name: str, tensor: Tensor) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class Narrowing:
    """One run over one model.

    Attributes:
        plan: sizes before and after, in the words of the class that is written.
        stock: classes of what is written.
        writer: takes every tensor as soon as it is final.
        progress: told what is being done, steps done, steps in all.
        workspace: keeps the embedding, each layer, and the head as soon as they are final.
        costs: once run, on held-out calibration text, then on text of another kind where there is.
    """

    original: Original
    plan: Plan
    stock: Stock
    streams: Streams
    writer: Writer
    options: NarrowOptions
    progress: Progress = lambda stage, done, total: None
    workspace: Workspace = field(default_factory=Workspace)
    records: list[dict[str, Any]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    @torch.no_grad()
    def run(self, basis: Basis | None = None) -> Basis:
        """Narrow the whole model and write it; `basis` overrides the search for one."""
        basis = basis or self._search.found()
        self.E_DK = torch.from_numpy(basis.matrix_DK).to(self.streams.device)
        kept = self.plan.kept_layers
        steps = [EMBEDDING, *map(_step, range(len(kept))), HEAD]
        finished = self._processes.agreed(lambda: self._take(steps))
        if finished == len(steps):
            return basis
        self._start()
        stage = "narrowing"
        if finished > 1:
            stage += f": going on at layer {min(finished, len(kept))} of {len(kept)}"
        for place, number in enumerate(kept):
            following = [*kept[place + 1 :], self.before.num_layers][0]
            left_out = range(number + 1, following)
            if place + 1 < finished:
                self.progress("passing finished layers", place, finished - 1)
                self._pass(number, place, left_out)
            else:
                self._layer(number, place, left_out)
                self.progress(stage, following, self.before.num_layers)
        self._finish()
        return basis

    @property
    def _processes(self) -> Processes:
        return self.streams.processes

    @property
    def _search(self) -> BasisSearch:
        return BasisSearch(
            self.original,
            self.plan,
            self.options,
            self.streams,
            self.rehearse,
            self.progress,
            self.workspace,
        )

    def rehearse(self, basis: Basis) -> float:
        """Held-out KL divergence of a run over a part of the text that writes nothing."""
        run = replace(
            self,
            streams=self.streams.some(COMPARED, COMPARED // 2),
            writer=Nowhere(self.writer.specs),
            options=replace(self.options, mlp="obs", heads="obs", local=None),
            progress=lambda stage, done, total: None,
            workspace=Workspace(),
            records=[],
            costs=[],
        )
        run.run(basis)
        return run.divergence

    @property
    def divergence(self) -> float:
        """Once run, held-out KL divergence from the original in nats per token, the mean of both
        kinds of text."""
        return sum(cost.kl for cost in self.costs) / len(self.costs)

    @property
    def before(self) -> Sizes:
        return self.original.sizes

    @property
    def after(self) -> Sizes:
        return self.plan.after

    @cached_property
    def scale(self) -> float:
        """What readers carry for the narrower norm (models/exact_norm.py)."""
        before, after = self.before.hidden_size, self.after.hidden_size
        return exact_norm(before, after, self.stock.epsilon).gain

    def _onto(self) -> Tensor:
        """From the original's stream onto the narrower one, (D, K)."""
        return self.E_DK * self.original.family.stream_gain(self.scale)

    # What an earlier run of the same command finished ------------------------------------------

    def _take(self, steps: Sequence[str]) -> int:
        """Write the steps that are kept, up to the first that is not; how many they are."""
        for number, step in enumerate(steps):
            if (kept := self.workspace.load(step)) is None:
                return number
            record, tensors = kept
            for name, tensor in tensors.items():
                self.writer.write(name, tensor)
            self.records += record["sites"]
        self.costs = [Cost(*cost) for cost in record["costs"]]
        return len(steps)

    def _keep(self, step: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Write what is final, and keep it with its reports."""
        for name, tensor in tensors.items():
            self.writer.write(name, tensor)
        specs = self.writer.specs
        self.workspace.save(step, record, {n: t.to(specs[n].dtype) for n, t in tensors.items()})

    def _pass(self, number: int, place: int, left_out: Sequence[int]) -> None:
        """Both streams move behind a finished layer as they did when it was narrowed."""
        kept = self._processes.agreed(lambda: self.workspace.load(_step(place)))
        assert kept is not None
        prefix = self.original.family.layer_name(place, "")
        device = self.streams.device
        tensors = {name.removeprefix(prefix): t.to(device) for name, t in kept[1].items()}
        student = Layer(self.stock, self.original.family, place, tensors)
        self._pass_over([number])
        for sublayer in student.sublayers:
            self.streams.advance_narrowed(partial(student.after, sublayer))
        self._pass_over(left_out)

    # Embedding, layers, head: teacher and student side by side --------------------------------

    def _start(self) -> None:
        embedding_VD = self.original.embedding()
        name = f"{self.original.family.embedding}.weight"
        kept = self._processes.agreed(lambda: self.workspace.load(EMBEDDING))
        if kept:
            tensors = {n: tensor.to(self.streams.device) for n, tensor in kept[1].items()}
        else:
            onto_DK = self._onto() / self._embedding_scale
            tensors = {name: self._product(name, embedding_VD, onto_DK)}
        narrow_VK = tensors[name]
        self._table_VK = narrow_VK if self.after.tied else None
        self.original.enter(embedding_VD, self.streams)
        beside = self.streams.beside_original
        scaled_VK = narrow_VK if self._embedding_scale == 1.0 else narrow_VK * self._embedding_scale
        embed(scaled_VK, self.streams, self.streams.narrowed_NLK)
        records = []
        if (given := self.original.family.per_layer) and (theirs := beside.inputs):
            projection = f"{given.projection.name}.weight"
            if not kept:
                asked = theirs.projection_XD, self.streams, self.E_DK, self.options
                map_DK, report = projection_map(*asked)
                tensors[projection] = self._product(projection, theirs.projection_XD, map_DK)
                records.append({"layer": None, "site": given.projection.name, **report})
            narrow = scaled_VK, tensors[projection], self.stock
            self.streams.beside_narrowed.inputs = narrowed_inputs(theirs, *narrow)
        if not kept:
            self.records += records
            self._keep(EMBEDDING, tensors, sites=records)

    @property
    def _embedding_scale(self) -> float:
        """What the narrower class multiplies rows of its embedding with."""
        return self.original.family.embedding_scale(self.after.hidden_size)

    def _layer(self, number: int, place: int, left_out: Sequence[int]) -> None:
        """Narrow a layer of the original; it is number `place` of what is written.

        Its last writer answers for the layers behind it that are left out: its target is the
        original's stream behind them.
        """
        family = self.original.family
        teacher = self.original.layer(number)
        student = self._student(place, teacher)
        records = []
        *_, last = teacher.sublayers
        for sublayer in teacher.sublayers:
            space = sublayer.writer.in_
            units, method = self._units(space)
            kind: Any = Site
            if sublayer.router:
                kind = partial(ExpertSite, num_experts=self.after.num_experts)
            site: Site = kind(
                sublayer,
                teacher,
                student,
                self.streams,
                self.E_DK,
                self.scale,
                self.after.spaces[space],
                family.gated,
                units,
                method,
                self.options,
                partial(self._pass_over, left_out if sublayer is last else ()),
            )
            for record in site.narrow():
                logger.info("layer %d, %s: %s", number, record["site"], record)
                records.append({"layer": number, **record})
        self.records += records
        tensors = {family.layer_name(place, n): tensor for n, tensor in student.tensors().items()}
        self._keep(_step(place), tensors, sites=records)

    def _units(self, space: str) -> tuple[Units, str]:
        """What can leave of a sublayer, by the space of its writer's inputs, and how it is chosen;
        where no axis cuts that, it is one group that stays, or channels as many as the stream has
        axes."""
        if axis := cutting(self.before, space):
            return axis.units(self.before, space), axis.method(self.options)
        if space in self.before.as_wide:
            # Merged channels would be products of sums.
            method = "select" if self.options.mlp == "select" else "obs"
            return Channels(self.before.spaces[space]), method
        return Groups(1, 1, self.before.spaces[space]), self.options.heads

    def _pass_over(self, layers: Sequence[int]) -> None:
        """Layers that are not written: the original's stream alone moves behind them."""
        for number in layers:
            teacher = self.original.layer(number)
            for sublayer in teacher.sublayers:
                self.streams.advance_original(partial(teacher.after, sublayer))

    def _student(self, number: int, teacher: Layer) -> Layer:
        """The analytic student: readers W E s, writers E^T W, rounded as they will be stored."""
        family, tensors = self.original.family, teacher.tensors()
        neutral_K = torch.ones(self.after.hidden_size, device=self.streams.device)
        for sublayer in teacher.sublayers:
            if sublayer.norm:
                tensors[f"{sublayer.norm}.weight"] = neutral_K - float(family.unit_offset)
            for linear in sublayer.linears:
                if not self.after.has_bias(linear):
                    continue
                for name in linear.names(self.before.num_experts):
                    weight_OI = tensors[f"{name}.weight"]
                    tensors.setdefault(f"{name}.bias", weight_OI.new_zeros(len(weight_OI)))
            for linear in sublayer.all_readers:
                inner = sublayer.inner_gain(linear, family.inner_scale(self.scale))
                outer = sublayer.gain(self.scale)
                for name in linear.names(self.before.num_experts):
                    weight, bias = f"{name}.weight", f"{name}.bias"
                    tensors[weight] = (tensors[weight].double() @ self.E_DK) * (outer * inner)
                    if bias in tensors:
                        tensors[bias] = tensors[bias] * inner
            tensors |= self._narrow_writer(sublayer, tensors)
        dtypes = {name: self._stored(teacher.number, number, name) for name in tensors}
        return Layer(self.stock, family, number, tensors, dtypes)

    def _stored(self, number: int, place: int, name: str) -> torch.dtype:
        """Type of a tensor below layer `number` of the original, which is written as `place`; what
        is not written, an expert that leaves, as the original has it."""
        family, source = self.original.family, self.original.source
        if spec := self.writer.specs.get(family.layer_name(place, name)):
            return spec.dtype
        return source.specs[family.layer_name(number, name)].dtype

    def _narrow_writer(
        self, sublayer: Sublayer, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """E^T W; behind it lies a norm in some classes, whose gamma goes with it."""
        parts = ("weight", "bias")
        if sublayer.output_norm is None:
            count = self.before.num_experts
            writers = [writer for each in sublayer.writers for writer in each.names(count)]
            names = [f"{writer}.{part}" for writer in writers for part in parts]
            return {n: self._onto().T @ tensors[n].double() for n in names if n in tensors}
        weight, bias = (f"{sublayer.writer.name}.{part}" for part in parts)
        norm, offset = f"{sublayer.output_norm}.weight", float(self.original.family.unit_offset)
        columns = [tensors[weight]] + ([tensors[bias][:, None]] if bias in tensors else [])
        rows_KI, gamma_K = merged(torch.cat(columns, 1), tensors[norm] + offset, self.E_DK)
        # Divided by K where the original divided by D, as every norm of the narrower model.
        found = {weight: rows_KI, norm: gamma_K * self.scale - offset}
        if bias in tensors:
            found |= {weight: rows_KI[:, :-1], bias: rows_KI[:, -1]}
        return found

    # The head -----------------------------------------------------------------------------------

    def _finish(self) -> None:
        family = self.original.family
        norm, head = f"{family.final_norm}.weight", f"{family.head.name}.weight"
        head_VD = self.original.folded_head()
        records = len(self.records)
        tensors = {}
        if self._table_VK is None:
            gamma_K = torch.ones(self.after.hidden_size, device=self.streams.device)
            narrow_VK = self._product(head, head_VD, self._head_projection(head_VD))
            tensors[head] = narrow_VK
        else:
            gamma_K = self._shared_head_gamma()
            narrow_VK = self._table_VK
        tensors[norm] = gamma_K - float(family.unit_offset)
        heads = Head(self.original.stock, head_VD), Head(self.stock, narrow_VK * gamma_K.float())
        self.costs = costs_of(self.streams, *heads)
        costs = [astuple(cost) for cost in self.costs]
        self._keep(HEAD, tensors, sites=self.records[records:], costs=costs)

    def _head_projection(self, head_VD: Tensor) -> Tensor:
        """P of `W' = W P`, for a head that is free."""
        analytic_DK = self.E_DK * self.scale
        if not self.options.refit:
            return analytic_DK
        return self._fit_head(head_VD, analytic_DK, 1.0, ridge_solver)

    def _shared_head_gamma(self) -> Tensor:
        """A table shared with the embedding cannot change; the final norm's gamma still can.

        Its prior is diag(E^T Gamma E) s, which is the original gamma where no axis is mixed. Where
        the table was scaled for the embedding's sake, gamma takes it back.
        """
        family = self.original.family
        scaled = family.embedding_scale(self.before.hidden_size) / self._embedding_scale
        scaled *= family.stream_gain(self.scale)
        gamma_D = self.original.gamma().double()
        prior_K = torch.einsum("dk,d,dk->k", self.E_DK, gamma_D, self.E_DK) * self.scale
        if not self.options.refit:
            return prior_K / scaled
        table_VD, solver = self.original.table(), partial(gain_solver, map_OI=self.E_DK)
        fitted_DK = self._fit_head(table_VD, self.E_DK * prior_K, gamma_D, solver)
        return (self.E_DK * fitted_DK).sum(0) / scaled

    def _fit_head(
        self, head_VD: Tensor, analytic_DK: Tensor, gamma_D: Tensor | float, solver: Solver
    ) -> Tensor:
        after, before = self._final_norms
        train, held = self.streams.moments(
            lambda rows: (
                after(self.streams.narrowed(rows)),
                (before(self.streams.original(rows)) * gamma_D).float(),
            ),
            metric_OO=metric(head_VD),
        )
        ridge = self.options.ridge
        fitted = self._processes.agreed(
            lambda: fit(train, held, analytic_DK, ridge=ridge, solver=solver)
        )
        norm = self.original.family.final_norm
        self.records.append({"layer": None, "site": norm, **fitted.as_dict()})
        return fitted.weights_OI

    @cached_property
    def _final_norms(self) -> tuple[Any, Any]:
        device = self.streams.device
        return self.stock.norm(device), self.original.stock.norm(device)

    def _product(self, name: str, table_VD: Tensor, map_DK: Tensor) -> Tensor:
        """A table of the vocabulary times a map, in float64 block by block, rounded as stored."""
        dtype = self.writer.specs[name].dtype
        blocks = torch.split(table_VD, ROWS)
        return torch.cat(
            self._processes.each(lambda block_RD: (block_RD.double() @ map_DK).to(dtype), blocks)
        )


def _step(place: int) -> str:
    """Name of a layer in a workspace."""
    return f"layer-{place:04d}"
