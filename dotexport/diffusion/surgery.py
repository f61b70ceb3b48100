"""One site under surgery: choose the units that stay, solve for what they say, cut the rest away.

Shapes: N units, I inputs of a writer, O its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dotexport.diffusion.moments import Moments
from dotexport.diffusion.tables import Site, attributes, linear
from dotexport.merging import obs

REFITTED = ("obs", "dot", "l1-refit")


def problems(
    model: nn.Module, site: Site, moments: Mapping[str, Moments], damping: float
) -> list[obs.Problem]:
    """The layers that a site's units leave together."""
    return [
        moments[name].problem(
            linear(model, name).weight.detach(),
            site.columns(model, name),
            damping=damping,
            centred=linear(model, name).bias is not None,
        )
        for name in site.writers
    ]


def choose(
    model: nn.Module,
    site: Site,
    moments: Mapping[str, Moments],
    count: int,
    *,
    method: str,
    damping: float,
    seed: int = 0,
) -> obs.Removal:
    """The order in which `count` units leave.

    `obs` and `dot` ask for the exact loss; the baselines for the size of the unit's weights (`l1`),
    that times the size of what it says (`wanda`, Sun et al. 2023), or a coin (`random`).
    """
    if not count:
        return obs.Removal((), ())
    if method in ("obs", "dot"):
        return obs.greedy(problems(model, site, moments, damping), count)
    if method == "random":
        rng = torch.Generator().manual_seed(seed)
        score_N = torch.rand(site.units, generator=rng, dtype=torch.float64)
    elif method == "wanda":
        score_N = _activity(model, site, moments)
    else:
        score_N = _size(model, site)
    order = torch.argsort(score_N, stable=True)[:count]
    return obs.Removal(tuple(order.tolist()), tuple(score_N[order].cumsum(0).tolist()))


def _size(model: nn.Module, site: Site) -> Tensor:
    """Sum of |w| over all rows and columns of each unit."""
    total_N = torch.zeros(site.units, dtype=torch.float64)
    for name in site.readers:
        rows_O = linear(model, name).weight.detach().double().abs().sum(1)
        total_N += rows_O[site.rows(model, name)].sum(1)
    for name in site.writers:
        columns_I = linear(model, name).weight.detach().double().abs().sum(0)
        total_N += columns_I[site.columns(model, name)].sum(1)
    return total_N


def _activity(model: nn.Module, site: Site, moments: Mapping[str, Moments]) -> Tensor:
    """Sum of |w_oi| rms(x_i) over the columns of each unit."""
    total_N = torch.zeros(site.units, dtype=torch.float64)
    for name in site.writers:
        rms_I = moments[name].hessian(centred=False).diagonal().clamp_min(0).sqrt()
        columns_I = linear(model, name).weight.detach().double().abs().sum(0) * rms_I
        total_N += columns_I[site.columns(model, name)].sum(1)
    return total_N


@torch.no_grad()
def cut(
    model: nn.Module,
    site: Site,
    kept: Tensor,
    moments: dict[str, Moments],
    *,
    damping: float,
    refit: bool = True,
) -> float:
    """Remove all units but `kept` from the model; what that loses on the calibration data.

    The kept columns of every writer are solved for once more, exactly, in float64 and from the
    weights before any update; its bias takes over the mean of what left. Nothing is touched where
    nothing leaves. `moments` follow the writers, for another site may share one.
    """
    if len(kept) == site.units:
        return 0.0
    # All that needs the old widths comes first.
    rows = {name: site.rows(model, name)[kept] for name in site.readers}
    columns = {name: _columns_left(model, site, name, kept) for name in site.writers}
    lost = 0.0
    for name in site.writers:
        lost += _cut_writer(linear(model, name), moments[name], columns[name], damping, refit)
        moments[name] = moments[name].of(columns[name])
    for name in site.readers:
        parts = rows[name].shape[1] // site.size
        # Part after part again: a GEGLU splits its rows in the middle.
        index = rows[name].view(len(kept), parts, site.size).transpose(0, 1).flatten()
        keep_rows(linear(model, name), index)
    module = model.get_submodule(site.name)
    for attribute, value in attributes(module, site, len(kept)).items():
        setattr(module, attribute, value)
    return lost


def _columns_left(model: nn.Module, site: Site, writer: str, kept: Tensor) -> Tensor:
    stays_I = torch.ones(linear(model, writer).in_features, dtype=torch.bool)
    stays_I[site.columns(model, writer).flatten()] = False
    stays_I[site.columns(model, writer)[kept].flatten()] = True
    return stays_I.nonzero().flatten()


def _cut_writer(
    layer: nn.Linear, moments: Moments, kept: Tensor, damping: float, refit: bool
) -> float:
    old_OI, centred = layer.weight.detach().double(), layer.bias is not None
    new_OI = torch.zeros_like(old_OI)
    if refit:
        problem = moments.problem(old_OI, torch.empty(0, 1), damping=damping, centred=centred)
        new_OI[:, kept] = obs.refit(problem.weight_OI, problem.hessian_II, kept)
    else:
        new_OI[:, kept] = old_OI[:, kept]
    lost = obs.loss(old_OI, new_OI, moments.hessian(centred=centred and refit))
    if centred and refit:
        layer.bias.add_(_bias_shift(layer, old_OI, new_OI, moments).to(layer.bias.dtype))
    layer.weight = nn.Parameter(new_OI[:, kept].to(layer.weight.dtype).contiguous())
    layer.in_features = len(kept)
    return lost


def _bias_shift(layer: nn.Linear, old_OI: Tensor, new_OI: Tensor, moments: Moments) -> Tensor:
    """What a bias gains so that the mean of what the layer says is the mean of what it should."""
    if moments.answers_O is None:
        return (old_OI - new_OI) @ moments.mean
    wanted_O = moments.answers_O / max(moments.weight, 1e-300)
    return wanted_O - layer.bias.double() - new_OI @ moments.mean


@torch.no_grad()
def keep_rows(layer: nn.Linear, rows: Tensor) -> None:
    """Leave these outputs of a layer, in this order."""
    layer.weight = nn.Parameter(layer.weight[rows].contiguous())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows].contiguous())
    layer.out_features = len(rows)


Widths = Mapping[str, Mapping[str, int]]


def widths(model: nn.Module) -> Widths:
    """Every integer of every submodule."""
    return {
        name: {key: value for key, value in vars(module).items() if type(value) is int}
        for name, module in model.named_modules()
    }


def layout_of(model: nn.Module, before: Widths) -> list[dict[str, int | str]]:
    """The `pruned_layout` of a model that was cut since its widths were `before`."""
    entries: dict[str, dict[str, int | str]] = {}
    for entry in getattr(model, "config", {}).get("pruned_layout", ()):  # cut before
        entries[entry["module"]] = dict(entry)
    for name, integers in widths(model).items():
        changed = {key: value for key, value in integers.items() if value != before[name][key]}
        if changed:
            entries[name] = {"module": name, **entries.get(name, {}), **changed}
    return list(entries.values())
