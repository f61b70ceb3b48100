"""Feed-forward neurons that leave are transported onto kept ones, as in LLMs (merging/neurons.py).

Rows of the readers become barycentres of neurons that resemble each other; then least squares
finds what the writer should say of them. A merge stays only if held-out pictures are said better
than by the choice alone. Signs are not free: gelu is not odd.

Shapes: N neurons before, K after, T tokens, O outputs of the writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.calibration import Calibration
from dotexport.diffusion.moments import Moments
from dotexport.diffusion.sampling import replaced
from dotexport.diffusion.tables import Site, linear
from dotexport.merging.neurons import MERGE_LEVELS, Alike, Merge, barycentres
from dotexport.merging.ot.cost import cosine, same_sign_distance
from dotexport.merging.ot.coupling import couple
from dotexport.merging.transport_options import TransportOptions

HELD_OUT = 4
"""One picture in so many judges, and is not fitted."""

Rows = dict[str, Tensor]  # parameters of readers, by their full name


@dataclass
class Trial:
    """One set of reader rows, and what its neurons say; level None: the neurons as they are."""

    level: float | None
    rows: Rows
    fitted: Moments
    judged: Moments

    def solve(self, prior_OK: Tensor, damping: float, *, centred: bool, every: bool) -> Tensor:
        """Weights of the writer, from all tokens or from those that do not judge."""
        moments = self.fitted + self.judged if every else self.fitted
        return moments.best_weights(prior_OK, damping=damping, centred=centred)

    def loss(self, weight_OK: Tensor, *, centred: bool) -> float:
        """E|y - W z|^2 on the tokens that judge, up to what does not depend on W."""
        hessian_KK = self.judged.hessian(centred=centred)
        cross_OK = self.judged.cross(centred=centred)
        return float(((weight_OK @ hessian_KK - 2 * cross_OK) * weight_OK).sum())


@dataclass(frozen=True)
class Merged:
    """What replaces the layers of a site after it was cut."""

    level: float
    rows: Rows = field(repr=False)
    weight_OK: Tensor = field(repr=False)
    bias_O: Tensor | None = field(repr=False)

    @torch.no_grad()
    def put(self, model: nn.Module, site: Site) -> None:
        for name, value in self.rows.items():
            parameter = model.get_parameter(name)
            parameter.copy_(value)
        writer = linear(model, site.writers[0])
        writer.weight.copy_(self.weight_OK)
        if self.bias_O is not None:
            writer.bias.copy_(self.bias_O)


def transport(
    calibration: Calibration,
    chosen: Mapping[Site, Tensor],
    moments: Mapping[str, Moments],
    damping: float,
    stage: str,
) -> dict[Site, Merged]:
    """The merges that improve on the choice alone, after one more run over the prompts.

    Sites whose writer others share (the single blocks of Flux) keep the choice.
    """
    sites = [site for site in chosen if site.kind == "ffn" and not site.last]
    trials = {site: _trials(calibration.model, site, chosen[site], moments) for site in sites}
    if not trials:
        return {}
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(_tried(calibration.model, site, chosen[site], trials[site]))
        calibration.run(stage)
    found = {site: _best(calibration.model, site, trials[site], damping) for site in sites}
    return {site: merged for site, merged in found.items() if merged is not None}


def _trials(
    model: nn.Module, site: Site, kept: Tensor, moments: Mapping[str, Moments]
) -> list[Trial]:
    """The neurons as they are, and merged where they resemble each other enough."""
    (writer,) = site.writers
    layer, seen = linear(model, writer), moments[writer]
    columns_N = layer.weight.detach().double().norm(dim=0)
    mass_N = columns_N * seen.hessian(centred=False).diagonal().clamp_min(0).sqrt()
    gram_NN, kept_K = seen.inputs_II.numpy(), kept.numpy()
    coupling = couple(same_sign_distance(gram_NN, kept_K), mass_N.numpy(), TransportOptions())
    alike = Alike.of(kept, coupling.mass_N, [(cosine(gram_NN, kept_K), coupling)])
    made: list[tuple[float | None, Rows]] = [(None, {})]
    for level in MERGE_LEVELS:
        merge = barycentres(alike, least_cosine=level)
        if merge.moved > 0:
            made.append((level, _rows(model, site, merge)))
    shape = (len(kept), layer.out_features)
    return [
        Trial(level, rows, Moments.zeros(*shape), Moments.zeros(*shape)) for level, rows in made
    ]


def _rows(model: nn.Module, site: Site, merge: Merge) -> Rows:
    """Readers whose rows are barycentres, part after part."""
    made: Rows = {}
    for name in site.readers:
        layer = linear(model, name)
        parts = layer.out_features // site.units
        for key, value in layer.state_dict().items():
            value_PNX = value.view(parts, site.units, -1)
            merged_PKX = torch.stack([merge.rows("gate", rows_NX) for rows_NX in value_PNX])
            made[f"{name}.{key}"] = merged_PKX.reshape(-1, *value.shape[1:]).to(value.dtype)
    return made


@contextmanager
def _tried(model: nn.Module, site: Site, kept: Tensor, trials: Sequence[Trial]) -> Iterator[None]:
    """Whenever the feed-forward layer is called, every trial is asked the same."""
    module, writer = model.get_submodule(site.name), linear(model, site.writers[0])
    forward, seen = module.forward, []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    def asked(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        hidden, answer = seen.pop()
        for trial in trials:
            if trial.level is not None:
                with _swapped(model, site, kept, trial.rows):
                    forward(*args, **kwargs)
                hidden, _ = seen.pop()
            _take(trial, hidden[..., kept], answer)
        return made

    handle = writer.register_forward_hook(keep)
    try:
        with replaced(module, "forward", asked):
            yield
    finally:
        handle.remove()


def _take(trial: Trial, hidden: Tensor, answer: Tensor) -> None:
    judges = torch.arange(len(hidden)) % HELD_OUT == HELD_OUT - 1
    for moments, rows in ((trial.judged, judges), (trial.fitted, ~judges)):
        if bool(rows.any()):
            moments.add(hidden[rows].flatten(0, -2), answer[rows].flatten(0, -2))


@contextmanager
def _swapped(model: nn.Module, site: Site, kept: Tensor, rows: Rows) -> Iterator[None]:
    """Merged rows in the places of the kept neurons; the others' do not matter."""
    undo: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, value in rows.items():
                parameter = model.get_parameter(name)
                parts = len(parameter) // site.units
                places = (torch.arange(parts)[:, None] * site.units + kept).flatten()
                undo.append((parameter, places, parameter[places].clone()))
                parameter.index_copy_(0, places, value)
        yield
    finally:
        for parameter, places, old in undo:
            parameter.data.index_copy_(0, places, old)


def _best(model: nn.Module, site: Site, trials: Sequence[Trial], damping: float) -> Merged | None:
    """The trial that says held-out pictures best; None if that is the choice alone."""
    if not trials[0].judged.weight or not trials[0].fitted.weight:
        return None
    layer = linear(model, site.writers[0])
    centred = layer.bias is not None
    plain = trials[0]
    none_OK = torch.zeros_like(plain.fitted.cross(centred=False))
    prior_OK = plain.solve(none_OK, damping, centred=centred, every=False)

    def judged(trial: Trial) -> float:
        fitted_OK = trial.solve(prior_OK, damping, centred=centred, every=False)
        return trial.loss(fitted_OK, centred=centred)

    best = min(trials, key=judged)
    if best.level is None:
        return None
    weight_OK = best.solve(prior_OK, damping, centred=centred, every=True)
    every = best.fitted + best.judged
    bias_O = None
    if centred:
        assert every.answers_O is not None
        bias_O = every.answers_O / every.weight - weight_OK @ every.mean
    return Merged(best.level, best.rows, weight_OK, bias_O)
