"""The narrowing itself: statistics, basis, and one layer after another merged and refitted.

Teacher (the original) and student (what becomes narrower) walk through the calibration text side
by side, one layer of each in memory at a time.

Shapes: N windows, L tokens per window, B windows of a batch, D width before, K width after,
V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dotexport.basis import Basis, find_basis, whole
from dotexport.checkpoint import Checkpoint, CheckpointWriter
from dotexport.families import Family, Sizes
from dotexport.layers import Layer, Stock, layer_tensors
from dotexport.refit import Solver, fit, gain_solve, ridge_solve
from dotexport.site import NarrowOptions, Site
from dotexport.streams import Streams, check_finite

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
ROWS = 16384  # of a vocabulary in float64 at once: as a whole it does not fit twice


@dataclass
class Narrowing:
    """One run over one model.

    Attributes:
        before, after: sizes of the original and of what is written.
        writer: takes every tensor as soon as it is final.
        progress: told what is being done, steps done, steps in all.
    """

    source: Checkpoint
    family: Family
    before: Sizes
    after: Sizes
    stock_before: Stock
    stock_after: Stock
    streams: Streams
    writer: CheckpointWriter
    options: NarrowOptions
    progress: Progress = lambda stage, done, total: None
    records: list[dict[str, Any]] = field(default_factory=list)

    def run(self, basis: Basis | None = None) -> Basis:
        """Narrow the whole model and write it; `basis` overrides the search for one."""
        basis = basis or self._basis()
        self.E_DK = torch.from_numpy(basis.matrix_DK).to(self.streams.device)
        self._start()
        for number in range(self.before.num_layers):
            self._layer(number)
            self.progress("narrowing", number + 1, self.before.num_layers)
        self._finish()
        return basis

    @cached_property
    def scale(self) -> float:
        """sqrt(D / K): stock RMSNorm divides by K where the original divided by D.

        It goes into the readers; together with rms_norm_eps D / K the two then agree exactly.
        """
        return math.sqrt(self.before.hidden_size / self.after.hidden_size)

    # The basis: one pass of the original ------------------------------------------------------

    def _basis(self) -> Basis:
        if self.after.hidden_size == self.before.hidden_size:
            return whole(self.before.hidden_size)
        moment_DD = self._stream_moment().cpu().numpy()
        options = self.options
        return find_basis(options.basis, moment_DD, self.after.hidden_size, options.transport)

    def _stream_moment(self) -> Tensor:
        """Second moment of the NORMALISED stream, averaged over all norm sites of the original.

        A sum over the raw stream would let the last layers, whose norm is 10 to 100 times larger,
        own the basis. Weighing sites by what their readers do with them was measured and is worse
        (docs/log.md).
        """
        self._embed(self._embedding(), self.streams.original_NLD)
        total_DD = torch.zeros((), device=self.streams.device)
        for number in range(self.before.num_layers):
            layer = Layer(self.stock_before, self.family, number, self._folded(number))
            for sublayer in self.family.sublayers:
                total_DD = total_DD + self._moment(partial(layer.normalise, sublayer))
                self.streams.advance_original(partial(layer.after, sublayer))
            self.progress("reading the original", number + 1, self.before.num_layers)
        total_DD = total_DD + self._moment(self._final_norm(self.stock_before))
        return total_DD / total_DD.trace()

    def _moment(self, normalise: Callable[[Tensor], Tensor]) -> Tensor:
        size = self.before.hidden_size
        moment_DD = torch.zeros(size, size, dtype=torch.float64, device=self.streams.device)
        for rows in self.streams.batches():
            # The first position is an attention sink: one outlier, the same in every window.
            x_TD = normalise(self.streams.original(rows))[:, 1:].flatten(0, 1).double()
            moment_DD += x_TD.T @ x_TD
        check_finite(moment_DD.trace())
        return moment_DD

    # Embedding, layers, head: teacher and student side by side --------------------------------

    def _start(self) -> None:
        embedding_VD = self._embedding()
        name = f"{self.family.embedding}.weight"
        narrow_VK = self._product(name, embedding_VD, self.E_DK)
        self.writer.write(name, narrow_VK)
        self._embed(embedding_VD, self.streams.original_NLD)
        self._embed(narrow_VK, self.streams.narrowed_NLK)

    def _layer(self, number: int) -> None:
        tensors = self._folded(number)
        teacher = Layer(self.stock_before, self.family, number, tensors)
        student = self._student(number, tensors)
        for sublayer in self.family.sublayers:
            site = Site(
                sublayer,
                teacher,
                student,
                self.streams,
                self.E_DK,
                self.scale,
                self.after.spaces[sublayer.writer.in_],
                self.family.gated,
                self.options,
            )
            for record in site.narrow():
                logger.info("layer %d, %s: %s", number, record["site"], record)
                self.records.append({"layer": number, **record})
        for name, tensor in student.tensors().items():
            self.writer.write(self.family.layer_name(number, name), tensor)

    def _finish(self) -> None:
        norm, head = f"{self.family.final_norm}.weight", f"{self.family.head.name}.weight"
        if self.after.tied:
            self.writer.write(norm, self._shared_head_gamma())
            return
        head_VD = self._folded_head()
        self.writer.write(norm, torch.ones(self.after.hidden_size))
        self.writer.write(head, self._product(head, head_VD, self._head_projection(head_VD)))

    def _head_projection(self, head_VD: Tensor) -> Tensor:
        """P of `W' = W P`, for a head that is free."""
        analytic_DK = self.E_DK * self.scale
        if not self.options.refit:
            return analytic_DK
        return self._fit_head(head_VD, analytic_DK, ridge_solve)

    def _shared_head_gamma(self) -> Tensor:
        """A table shared with the embedding cannot change; the final norm's gamma still can."""
        gamma_D = self._read(f"{self.family.final_norm}.weight")
        if not self.options.refit:
            return gamma_D
        return self._fit_head(self._embedding(), gamma_D.double().diag(), gain_solve).diagonal()

    def _fit_head(self, head_VD: Tensor, analytic_DK: Tensor, solve: Solver) -> Tensor:
        before, after = self._final_norm(self.stock_before), self._final_norm(self.stock_after)
        gamma_D = self._read(f"{self.family.final_norm}.weight") if self.after.tied else 1.0
        train, held = self.streams.moments(
            lambda rows: (
                after(self.streams.narrowed(rows)),
                before(self.streams.original(rows)) * gamma_D,
            ),
            metric_OO=gram(head_VD),
        )
        fitted = fit(train, held, analytic_DK, solve=solve)
        self.records.append({"layer": None, "site": self.family.final_norm, **fitted.as_dict()})
        return fitted.weights_OI

    # Reading and folding ----------------------------------------------------------------------

    def _read(self, name: str) -> Tensor:
        return self.source.tensor(name).to(self.streams.device).float()

    def _embedding(self) -> Tensor:
        return self._read(f"{self.family.embedding}.weight")

    def _folded_head(self) -> Tensor:
        """lm_head with the final norm's gamma folded in, in original coordinates."""
        source = self.family.embedding if self.before.tied else self.family.head.name
        head_VD = self._read(f"{source}.weight")
        return head_VD * self._read(f"{self.family.final_norm}.weight")

    def _final_norm(self, stock: Stock) -> Callable[[Tensor], Tensor]:
        return stock.norm(self.streams.device)

    def _folded(self, number: int) -> dict[str, Tensor]:
        """A layer's tensors with every norm's gamma folded into its readers."""
        tensors = layer_tensors(self.family, number, self._read, self._declared)
        for sublayer in self.family.sublayers:
            gamma = f"{sublayer.norm}.weight"
            for linear in sublayer.readers:
                tensors[f"{linear.name}.weight"] *= tensors[gamma]
            tensors[gamma] = torch.ones_like(tensors[gamma])
        return tensors

    @cached_property
    def _declared(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.writer.specs)

    def _student(self, number: int, folded: Mapping[str, Tensor]) -> Layer:
        """The analytic student: readers W E s, writers E^T W, rounded as they will be stored."""
        tensors = dict(folded)
        for sublayer in self.family.sublayers:
            tensors[f"{sublayer.norm}.weight"] = torch.ones(
                self.after.hidden_size, device=self.streams.device
            )
            for linear in sublayer.readers:
                name = f"{linear.name}.weight"
                tensors[name] = (tensors[name].double() @ self.E_DK) * self.scale
            for part in ("weight", "bias"):
                name = f"{sublayer.writer.name}.{part}"
                if name in tensors:
                    tensors[name] = self.E_DK.T @ tensors[name].double()
        dtypes = {
            name: self.writer.specs[self.family.layer_name(number, name)].dtype for name in tensors
        }
        return Layer(self.stock_after, self.family, number, tensors, dtypes)

    def _product(self, name: str, table_VD: Tensor, map_DK: Tensor) -> Tensor:
        """A table of the vocabulary times a map, in float64 block by block, rounded as stored."""
        dtype = self.writer.specs[name].dtype
        blocks = torch.split(table_VD, ROWS)
        return torch.cat([(block_RD.double() @ map_DK).to(dtype) for block_RD in blocks])

    def _embed(self, embedding_VX: Tensor, stream_NLX: Tensor) -> None:
        for rows in self.streams.batches():
            tokens_BL = self.streams.windows_NL[rows].to(embedding_VX.device)
            stream_NLX[rows] = embedding_VX[tokens_BL].to(stream_NLX.device)


def gram(weights_OI: Tensor) -> Tensor:
    """W^T W in float64, a block of rows at a time."""
    size = weights_OI.shape[1]
    total_II = torch.zeros(size, size, dtype=torch.float64, device=weights_OI.device)
    for block_OI in torch.split(weights_OI, ROWS):
        total_II += block_OI.double().T @ block_OI.double()
    return total_II
