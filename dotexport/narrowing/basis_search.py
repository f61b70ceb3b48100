"""Which basis a run takes: the one that is asked for, or the best of all that the class allows.

Shapes: D width before, K width after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dotexport.axes.plan import Plan
from dotexport.merging.refit import symmetric_solve
from dotexport.narrowing.basis import Basis, best_of, check_basis, find_basis, methods_for, whole
from dotexport.narrowing.narrow_options import AUTO, NarrowOptions
from dotexport.narrowing.norm_statistics import Progress, Sight, look
from dotexport.narrowing.original import Original, metric
from dotexport.narrowing.streams import Streams
from dotexport.storage.workspace import Workspace


@dataclass
class BasisSearch:
    """The search of one run.

    Attributes:
        rehearse: held-out KL divergence of a basis, nats per token, where several are measured.
        workspace: keeps each basis, and what was measured of it.
    """

    original: Original
    plan: Plan
    options: NarrowOptions
    streams: Streams
    rehearse: Callable[[Basis], float]
    progress: Progress
    workspace: Workspace

    def found(self) -> Basis:
        width, family = self.plan.after.hidden_size, self.original.family
        if width == self.plan.before.hidden_size:
            return whole(width)
        asked = self.options.basis or self._default
        check_basis(asked, family.architecture, rotates=family.rotates)
        methods = methods_for(family.rotates) if asked == AUTO else (asked,)
        bases = {name: self._kept(name) for name in methods}
        if len(bases) == 1:
            return next(iter(bases.values()))
        measured = {}
        for number, (name, basis) in enumerate(bases.items()):
            self.progress(f"measuring bases: {name}", number, len(bases))
            measured[name] = basis, self._measured(name, basis)
        return best_of(measured)

    @property
    def _default(self) -> str:
        if not self.original.family.rotates:
            return "dot"
        return "pca" if self.plan.after.tied else "learned"

    def _kept(self, method: str) -> Basis:
        """A basis that an earlier run of the same command found, or finds now."""
        step = f"basis-{method}"
        if kept := self.streams.processes.agreed(lambda: self.workspace.load(step)):
            record, tensors = kept
            return Basis(tensors["matrix_DK"].numpy(), **record)
        sight = self._sight
        basis = self.streams.processes.agreed(lambda: self._oriented(method, sight))
        record = {
            "method": basis.method,
            "kept_energy": basis.kept_energy,
            "transport": dict(basis.transport),
        }
        self.workspace.save(step, record, {"matrix_DK": torch.from_numpy(basis.matrix_DK)})
        return basis

    def _measured(self, method: str, basis: Basis) -> float:
        step = f"divergence-{method}"
        if kept := self.streams.processes.agreed(lambda: self.workspace.load(step)):
            return float(kept[0]["divergence"])
        divergence = self.rehearse(basis)
        self.workspace.save(step, {"divergence": divergence})
        return divergence

    @cached_property
    def _sight(self) -> Sight:
        sight = look(self.original, self.streams, self.progress)
        sight.tied = self.plan.after.tied
        return sight

    def _oriented(self, method: str, sight: Sight) -> Basis:
        """A basis; within its span, the one in which a tied head does best.

        A head that is the embedding's table can only be scaled axis by axis. In a basis turned by
        R, scaling by g is R diag(g) R^T in the old one: any symmetric matrix can be had. So the
        best symmetric one is solved for, and its eigenvectors are R.
        """
        after, rotates = self.plan.after, self.original.family.rotates
        transport = self.options.transport
        basis = find_basis(method, sight, after.hidden_size, transport, rotates=rotates)
        if not (after.tied and rotates):
            return basis
        matrix_DK = basis.matrix_DK @ self._turn_of_tied_head(basis, sight).cpu().numpy()
        return replace(basis, matrix_DK=matrix_DK)

    def _turn_of_tied_head(self, basis: Basis, sight: Sight) -> Tensor:
        """R: eigenvectors of the best symmetric matrix in the place of the final norm's gamma."""
        E_DK = torch.from_numpy(basis.matrix_DK).to(self.streams.device)
        metric_DD, moment_DD = metric(self.original.table()), sight.final
        assert moment_DD is not None
        gamma_D = self.original.gamma().double()
        ridge = 1e-9 * torch.eye(E_DK.shape[1], dtype=torch.float64, device=E_DK.device)
        left_KK, right_KK = (E_DK.T @ m @ E_DK for m in (metric_DD, moment_DD))
        wanted_KK = E_DK.T @ (metric_DD * gamma_D) @ moment_DD @ E_DK
        symmetric_KK = symmetric_solve(
            left_KK + ridge * left_KK.diagonal().mean(),
            right_KK + ridge * right_KK.diagonal().mean(),
            wanted_KK,
        )
        turn_KK: Tensor = torch.linalg.eigh(symmetric_KK).eigenvectors
        return turn_KK
