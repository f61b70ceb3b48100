"""Two layers laid side by side, and narrowed to the size of one.

Both read the stream in front of the first (FlattenGPT, arXiv 2602.08858): a layer of twice the
heads and twice the neurons. Units of both then compete for the places of one.

Shapes: N windows, L tokens per window, T tokens, D hidden_size, I inputs of a writer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dotexport.merging.gram import Gram
from dotexport.merging.heads import Groups
from dotexport.merging.neurons import Neurons
from dotexport.merging.refit import Fit, Moments, compensate, fit
from dotexport.merging.transport_options import TransportOptions
from dotexport.merging.units import Choice, Units
from dotexport.models.family import Sublayer
from dotexport.models.layers import Layer
from dotexport.narrowing.depth import Stack
from dotexport.narrowing.streams import inverse_rms

CALM = 0.1  # ridge under which units are chosen: a writer of two layers has as many inputs as some
# thousand tokens can tell apart
ATTENTION, MLP = "self_attn", "mlp"


@dataclass(frozen=True)
class Way:
    """How one layer is made of two.

    Attributes:
        both: sublayers with the units of both layers; the others are the first layer's alone.
        corrected: whether readers are fitted to what the original's saw.
        refit: whether writers are fitted, with error feedback, to the original's stream.
        method: how a sublayer of both is narrowed to the size of one; None: it stays as wide.
    """

    both: Collection[str] = (ATTENTION, MLP)
    corrected: bool = True
    refit: bool = True
    method: str | None = None


@dataclass(frozen=True)
class Side:
    """A sublayer of one of the two layers, and the stream that enters it in the original."""

    layer: Layer
    before_NLD: Tensor


@dataclass(frozen=True)
class Merger:
    """Makes layers of the original's layers, in front of streams of our choosing.

    Attributes:
        stack: the original, its streams, and how many of the windows are fitted on.
    """

    stack: Stack

    @torch.no_grad()
    def behind(self, layers: Sequence[int], stream_NLD: Tensor, way: Way) -> Tensor:
        """The stream behind one layer made of the first of these and, side by side, the last.

        Attention answers for what the attentions of both add; the MLP for the stream behind all.
        """
        original = self.stack.original
        after_NLD = self.stack.streams[layers[-1] + 1]
        sides = [
            Side(original.layer(number), self.stack.streams[number])
            for number in sorted({layers[0], layers[-1]})
        ]
        *_, last = original.family.sublayers
        for sublayer in original.family.sublayers:
            used = sides if sublayer.module in way.both else sides[:1]
            passed = [
                Side(side.layer, side.layer.after(sublayer, side.before_NLD)) for side in sides
            ]
            target_NLD = after_NLD
            if sublayer is not last:
                added = [p.before_NLD - s.before_NLD for p, s in zip(passed, used, strict=False)]
                target_NLD = used[0].before_NLD + torch.stack(added).sum(0)
            stream_NLD = self._through(sublayer, used, stream_NLD, target_NLD, way)
            sides = passed
        return stream_NLD

    def _through(
        self,
        sublayer: Sublayer,
        sides: Sequence[Side],
        stream_NLD: Tensor,
        target_NLD: Tensor,
        way: Way,
    ) -> Tensor:
        wide = self._side_by_side(sublayer, sides, stream_NLD, corrected=way.corrected)
        writer = f"{sublayer.writer.name}.weight"
        weights_DI = wide.tensor(writer).double()
        missing = target_NLD - stream_NLD, inverse_rms(target_NLD)
        if way.method and len(sides) > 1:
            weights_DI = self._narrowed(wide, sublayer, stream_NLD, missing, way.method)
        elif way.refit:
            moments = self._moments(wide.inside(sublayer, stream_NLD), *missing)
            weights_DI = fit(*moments, weights_DI).weights_OI
        written_NLD: Tensor = wide.inside(sublayer, stream_NLD) @ weights_DI.T.float()
        return stream_NLD + written_NLD

    def _side_by_side(
        self, sublayer: Sublayer, sides: Sequence[Side], stream_NLD: Tensor, *, corrected: bool
    ) -> Layer:
        """One layer with the units of all sides.

        Corrected: x ~ P y, with what the original's readers saw on the left and what the norm in
        front of all of them gives on the right; P goes into q, k, v, gate and up. Rotary embedding
        comes behind q and k, so any P is legal.
        """
        first = sides[0].layer
        wide = Layer(first.stock, first.family, first.number, first.tensors())
        y_NLD = first.normalise(sublayer, stream_NLD)
        rows: dict[str, list[Tensor]] = {f"{x.name}.weight": [] for x in sublayer.readers}
        for side in sides:
            map_DD = torch.eye(y_NLD.shape[-1], dtype=torch.float64)
            if corrected and side.before_NLD is not stream_NLD:
                x_NLD = side.layer.normalise(sublayer, side.before_NLD)
                metric_DD = side.layer.metric(sublayer)
                moments = self._moments(y_NLD, x_NLD, metric_DD=metric_DD)
                map_DD = fit(*moments, map_DD).weights_OI
            for name, found in rows.items():
                found.append(side.layer.tensor(name).double() @ map_DD)
        for name, found in rows.items():
            wide.assign(name, torch.cat(found))
        writer = f"{sublayer.writer.name}.weight"
        wide.assign(writer, torch.cat([side.layer.tensor(writer) for side in sides], 1))
        return wide

    def _narrowed(
        self,
        wide: Layer,
        sublayer: Sublayer,
        stream_NLD: Tensor,
        missing: tuple[Tensor, Tensor],
        method: str,
    ) -> Tensor:
        """Leave half of a sublayer's units; gives the writer behind them."""
        analytic_DI = wide.tensor(f"{sublayer.writer.name}.weight").double()
        rows = {x.name: wide.tensor(f"{x.name}.weight") for x in sublayer.readers}
        units = self._units(sublayer)
        train, held = self._moments(wide.inside(sublayer, stream_NLD), *missing)
        calm = leaning(train + held, analytic_DI, CALM)
        kept = units.choose("obs", calm, analytic_DI, units.count // 2)
        alone: Choice = units.alone(kept)
        prior_DI = compensate(train, analytic_DI, alone.kept)

        def fitted(choice: Choice) -> Fit:
            for linear in sublayer.readers:
                space = "gate" if linear.name == wide.family.gated else linear.out
                wide.assign(f"{linear.name}.weight", choice.rows(space, rows[linear.name]))
            return fit(*self._moments(wide.inside(sublayer, stream_NLD), *missing), prior_DI)

        def keys() -> Tensor:
            key = next(x.name for x in sublayer.readers if x.out == "kv")
            y_TD = wide.normalise(sublayer, stream_NLD)[: self._fitted].flatten(0, 1).double()
            weight_ID = rows[key].double()
            return weight_ID @ (y_TD.T @ y_TD) @ weight_ID.T

        best, accepted = fitted(alone), alone
        if method == "dot":
            asked = TransportOptions()
            keys_NN = None if sublayer.module == MLP else keys()
            for choice in units.merges(calm, analytic_DI, kept, asked, keys_NN)[1]:
                if (found := fitted(choice)).error < best.error:
                    best, accepted = found, choice
            best = fitted(accepted)
        return best.weights_OI

    def _units(self, sublayer: Sublayer) -> Units:
        """Of two layers side by side."""
        sizes = self.stack.original.sizes
        if sublayer.module == MLP:
            return Neurons(2 * sizes.intermediate_size)
        queries = sizes.num_attention_heads // sizes.num_key_value_heads
        return Groups(2 * sizes.num_key_value_heads, queries, sizes.head_dim)

    @property
    def _fitted(self) -> int:
        return len(self.stack.fitted_NL)

    def _moments(
        self,
        inputs_NLI: Tensor,
        targets_NLO: Tensor,
        weight_NL1: Tensor | None = None,
        *,
        metric_DD: Tensor | None = None,
    ) -> tuple[Moments, Moments]:
        """Of windows to fit on, and of each eighth, which chooses the ridge."""
        sums = []
        for held in (False, True):
            some = [n for n in range(self._fitted) if (n % 8 == 7) == held]
            moments = Moments.zeros(
                inputs_NLI.shape[-1], targets_NLO.shape[-1], metric_OO=metric_DD
            )
            for n in some:
                weight = 1.0 if weight_NL1 is None else weight_NL1[n]
                moments.add(inputs_NLI[n] * weight, targets_NLO[n] * weight)
            sums.append(moments)
        return sums[0], sums[1]


def leaning(moments: Moments, prior_OI: Tensor, ridge: float) -> Moments:
    """The sums whose plain least squares are those of a ridge toward the prior."""
    lam = ridge * float(moments.inputs.diagonal().mean())
    width, device = moments.inputs.width, moments.inputs.device
    extra = Gram.zeros(width, device)
    extra.add(math.sqrt(lam) * torch.eye(width, dtype=torch.float64, device=device))
    return replace(
        moments,
        inputs=moments.inputs + extra,
        cross_OI=moments.cross_OI + lam * prior_OI,
    )
