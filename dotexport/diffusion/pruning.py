"""A whole denoiser, package after package: calibrate, choose, cut.

Shapes: N units of a site.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dotexport.diffusion.calibration import Calibration, packages
from dotexport.diffusion.denoiser import Stored
from dotexport.diffusion.layout import Curve, Kept
from dotexport.diffusion.loss_probe import Probe
from dotexport.diffusion.merging import Merged, transport
from dotexport.diffusion.moments import Moments
from dotexport.diffusion.pipeline_options import PruneOptions
from dotexport.diffusion.sparse import Pattern, sweep
from dotexport.diffusion.surgery import REFITTED, choose, cut, problems
from dotexport.diffusion.tables import Site, linear
from dotexport.merging import obs
from dotexport.merging.obs import damped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteRecord:
    """What happened to one site: the loss is relative to the energy of what its writers said."""

    name: str
    kind: str
    units: int
    kept: int
    loss: float


def prune(
    calibration: Calibration,
    sites: Sequence[Site],
    kept: Kept,
    options: PruneOptions,
    stored: Stored,
) -> list[SiteRecord]:
    """Cut every site of the calibrated model down to what it keeps."""
    records = []
    parts = packages(sites, options.packages)
    for number, part in enumerate(parts):
        if stored.has(number):
            records += [SiteRecord(**entry) for entry in stored.load(calibration.model, number)]
            continue
        made, chosen = _prune_package(
            calibration, part, kept, options, f"package {number + 1} of {len(parts)}"
        )
        stored.save(calibration.model, number, chosen, [vars(record) for record in made])
        records += made
    return records


def _prune_package(
    calibration: Calibration,
    sites: Sequence[Site],
    kept: Kept,
    options: PruneOptions,
    stage: str,
) -> tuple[list[SiteRecord], dict[Site, Tensor]]:
    part = [site for site in sites if kept[site.name] < site.units]
    chosen: dict[Site, Tensor] = {}
    records = [_record(site, site.units, 0.0) for site in sites if site not in part]
    if not part:
        return records, chosen
    model = calibration.model
    moments = calibration.moments(writers(part), stage)
    energies: dict[Site, float] = {}
    for site in part:
        energy = sum(energy_of(linear(model, name), moments[name]) for name in site.writers)
        removal = choose(
            model,
            site,
            moments,
            site.units - kept[site.name],
            method=options.method,
            damping=options.damping,
            seed=options.seed,
        )
        chosen[site] = removal.kept(site.units, kept[site.name])
        energies[site] = max(energy, 1e-300)
    merges: dict[Site, Merged] = {}
    if options.method == "dot":
        merges = transport(calibration, chosen, moments, options.damping, f"{stage}, merging")
    for site in part:
        refit = options.method in REFITTED
        lost = cut(model, site, chosen[site], moments, damping=options.damping, refit=refit)
        records.append(_record(site, kept[site.name], lost / energies[site]))
        logger.info("%s: %d of %d", site.name, kept[site.name], site.units)
        if site in merges:
            merges[site].put(model, site)
            logger.info("%s: merged at cosine %s", site.name, merges[site].level)
    return records, chosen


def _record(site: Site, kept: int, loss: float) -> SiteRecord:
    return SiteRecord(site.name, site.kind, site.units, kept, loss)


def writers(sites: Sequence[Site]) -> list[str]:
    """Writers of these sites, each once."""
    return list(dict.fromkeys(name for site in sites for name in site.writers))


def energy_of(layer: nn.Linear, moments: Moments) -> float:
    """E|W x|^2."""
    weight_OI = layer.weight.detach().double()
    return obs.loss(weight_OI, torch.zeros_like(weight_OI), moments.hessian(centred=False))


def predict(
    calibration: Calibration, sites: Sequence[Site], share: float, options: PruneOptions
) -> dict[str, Curve]:
    """What each site would cost the model's answer, for any number of units that leave it.

    The exact loss at the writers, times what that loss does to the answer: measured once per site
    with `share` of its units gone and everything else dense.
    """
    curves = {}
    parts = packages(sites, options.packages)
    probe = Probe.record(calibration)
    plain = replace(calibration, teacher=None)
    for number, part in enumerate(parts):
        stage = f"predicting {number + 1} of {len(parts)}"
        moments = plain.moments(writers(part), stage)
        for site in part:
            asked = problems(calibration.model, site, moments, options.damping)
            removal = obs.greedy(asked, site.units - 1)
            gone = min(site.units - 1, max(1, round((1 - share) * site.units)))
            left = removal.kept(site.units, site.units - gone)
            harm = probe.harm(site, left, moments, options.damping)
            factor = harm / max(removal.losses[gone - 1], 1e-300)
            curves[site.name] = Curve(tuple(factor * loss for loss in removal.losses))
    return curves


@torch.no_grad()
def sparsify(
    calibration: Calibration, sites: Sequence[Site], pattern: Pattern, options: PruneOptions
) -> list[SiteRecord]:
    """Put zeros into every linear layer of the sites; shapes stay."""
    records = []
    parts = packages(sites, options.packages)
    for number, part in enumerate(parts):
        names = list(dict.fromkeys(n for site in part for n in (*site.readers, *site.writers)))
        moments = calibration.moments(names, f"package {number + 1} of {len(parts)}")
        for name in names:
            layer = linear(calibration.model, name)
            centred = layer.bias is not None
            hessian_II = moments[name].hessian(centred=centred)
            old_OI = layer.weight.double()
            damped_II = damped(hessian_II, max(options.damping, 1e-4))
            new_OI = sweep(old_OI, damped_II, pattern)
            energy = energy_of(layer, moments[name])
            if layer.bias is not None:
                layer.bias.add_(((old_OI - new_OI) @ moments[name].mean).to(layer.bias.dtype))
            layer.weight.copy_(new_OI)
            stays = int((new_OI != 0).sum())
            lost = obs.loss(old_OI, new_OI, hessian_II) / max(energy, 1e-300)
            records.append(SiteRecord(name, "weights", new_OI.numel(), stays, lost))
    return records
