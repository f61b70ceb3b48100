"""How many units each site keeps: one share for all, a budget, predicted loss, or the user's list.

Shapes: K units that leave a site.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import nn

from dotexport.diffusion.pipeline_options import LayoutOptions, parse_share
from dotexport.diffusion.tables import Kind, Site
from dotexport.errors import SizeError, UsageError
from dotexport.storage.reading import read_json

STEP = 8
"""Feed-forward widths are cut to multiples of this, where they are: kernels like it."""

Kept = dict[str, int]


def parse_budget(text: str, total: int) -> int:
    """Parameters of a budget: a share of `total`, or a number such as `2.5B` or `6e9`.

    Raises:
        UsageError: unreadable, or not smaller than what there is.
    """
    if text.endswith("x") or re.fullmatch(r"0?\.\d+", text):
        return int(parse_share(text) * total)
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text)
    if not found:
        raise UsageError(f"--params {text} cannot be read; expected such as 0.75x, 2.5B or 6e9")
    budget = int(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[found[2]])
    if not 0 < budget < total:
        raise UsageError(f"--params {text} is not less than the {total:,} parameters there are")
    return budget


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def from_file(sites: Sequence[Site], file: str) -> Kept:
    """Units to keep from a JSON object `{"transformer_blocks.0.attn": 3, ...}`; others stay whole.

    Raises:
        UsageError: no such file.
        SizeError: a site that is not there, or a number of units that it cannot have.
    """
    if not Path(file).is_file():
        raise UsageError(f"the layout {file} does not exist; give a JSON file")
    asked = read_json(Path(file), advice='expected {"SITE": UNITS, ...}')
    units = {site.name: site.units for site in sites}
    if strange := sorted(asked.keys() - units.keys()):
        raise SizeError(
            f"{file} names {strange[0]}, which this model does not have; its sites are "
            f"{', '.join(list(units)[:4])} ... ({len(units)} in all)"
        )
    for name, value in asked.items():
        if type(value) is not int or not 1 <= value <= units[name]:
            raise SizeError(f"{file}: {name} can keep 1 to {units[name]} units, not {value!r}")
    return units | asked


def uniform(model: nn.Module, sites: Sequence[Site], options: LayoutOptions) -> Kept:
    """The same share of every site of a kind.

    Raises:
        SizeError: a budget that not even the smallest layout meets.
    """
    if options.params is None:
        shares = {"heads": options.heads, "ffn": options.ffn}
        return {
            site.name: _share(site, parse_share(share)) if share else site.units
            for site in sites
            for share in (shares[site.kind],)
        }
    budget = parse_budget(options.params, num_parameters(model))
    both = _largest(model, sites, budget, lambda site, share: _share(site, share))
    # Heads come in large pieces; feed-forward layers fill what is left of the budget.
    return _largest(
        model,
        sites,
        budget,
        lambda site, share: both[site.name] if site.kind == "heads" else _share(site, share),
    )


def _share(site: Site, share: float) -> int:
    """Units of a share; feed-forward layers in steps, heads at least one."""
    step = STEP if site.kind == "ffn" and site.units % STEP == 0 else 1
    return min(site.units, max(step, step * round(share * site.units / step)))


def _largest(
    model: nn.Module, sites: Sequence[Site], budget: int, keep: Callable[[Site, float], int]
) -> Kept:
    """The largest share in steps of 1/1000 whose layout meets the budget."""
    costs = {site.name: site.cost(model) for site in sites}
    total = num_parameters(model)
    for thousandth in range(1000, 0, -1):
        kept = {site.name: keep(site, thousandth / 1000) for site in sites}
        gone = sum((site.units - kept[site.name]) * costs[site.name] for site in sites)
        if total - gone <= budget:
            return kept
    raise SizeError(
        f"{budget:,} parameters cannot be met: {total - gone:,} are left with one unit per site, "
        "because embeddings, norms and modulation stay; ask for more than that"
    )


@dataclass(frozen=True)
class Curve:
    """What a site is predicted to cost the model's answer, after each unit that leaves."""

    losses: tuple[float, ...]

    def hull(self, step: int) -> list[tuple[int, float]]:
        """Corners of the lower convex hull, as (units gone, loss), from (0, 0) on."""
        points = [(0, 0.0)]
        points += [(k, self.losses[k - 1]) for k in range(step, len(self.losses) + 1, step)]
        corners: list[tuple[int, float]] = []
        for point in points:
            while len(corners) > 1 and _slope(corners[-1], point) <= _slope(
                corners[-2], corners[-1]
            ):
                corners.pop()
            corners.append(point)
        return corners


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def by_loss(
    model: nn.Module, sites: Sequence[Site], curves: Mapping[str, Curve], even: Kept, together: bool
) -> Kept:
    """Remove as many parameters as the even layout does, where the predicted loss is least.

    Predicted losses of sites add up, and on the convex hull of each curve the cheapest piece per
    parameter is always the next to go. `together`: heads and neurons share one budget; else each
    kind keeps its own.
    """
    if together:
        return _cheapest(model, sites, curves, even)
    kept: Kept = {}
    kinds: tuple[Kind, Kind] = ("heads", "ffn")
    for kind in kinds:
        some = [site for site in sites if site.kind == kind]
        kept |= _cheapest(model, some, curves, even)
    return kept


def _cheapest(
    model: nn.Module, sites: Sequence[Site], curves: Mapping[str, Curve], even: Kept
) -> Kept:
    kept = {site.name: site.units for site in sites}
    cost = {site.name: site.cost(model) for site in sites}
    left = sum((site.units - even[site.name]) * cost[site.name] for site in sites)
    pieces: list[tuple[float, str, int]] = []
    for site in sites:
        step = STEP if site.kind == "ffn" and site.units % STEP == 0 else 1
        corners = curves[site.name].hull(step)
        for a, b in pairwise(corners):
            # In steps, so that the budget can end inside of a long piece.
            slope = _slope(a, b) / cost[site.name]
            pieces += [(slope, site.name, step)] * ((b[0] - a[0]) // step)
    heapq.heapify(pieces)
    while pieces and left > 0:
        _, name, units = heapq.heappop(pieces)
        if kept[name] > units and units * cost[name] <= left:
            kept[name] -= units
            left -= units * cost[name]
    return kept
