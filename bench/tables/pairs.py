"""One layer made of two: the second left out, or both laid side by side and narrowed.

Laid side by side, both read the stream in front of the first (FlattenGPT, arXiv 2602.08858): a
layer of twice the heads and twice the neurons, which is then narrowed to the size of one.

Shapes: N windows, L tokens per window, T tokens, D hidden_size, I inputs of a writer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

from dotexport.app.shrinking import open_source
from dotexport.axes.plan import read_model
from dotexport.bench.tables.fidelity import Notes
from dotexport.bench.tables.result_files import RESULTS, Out, Table, save
from dotexport.errors import UsageError
from dotexport.merging.heads import Groups
from dotexport.merging.neurons import Neurons
from dotexport.merging.refit import Fit, Moments, compensate, fit
from dotexport.merging.transport_options import TransportOptions
from dotexport.merging.units import Choice, Units
from dotexport.models.family import Sublayer
from dotexport.models.layers import Layer, Stock
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.depth import Stack
from dotexport.narrowing.original import Original
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


DROPPED = "second dropped, writer refitted"
WAYS: Mapping[str, Way] = {
    DROPPED: Way(both=()),
    "side by side": Way(corrected=False, refit=False),
    "side by side, readers corrected": Way(refit=False),
    "side by side, writers refitted too": Way(),
    "narrowed by OBS": Way(method="obs"),
    "narrowed by transport": Way(method="dot"),
    "MLPs alone, by OBS": Way(both=(MLP,), method="obs"),
    "MLPs alone, by transport": Way(both=(MLP,), method="dot"),
}
NARROWED = [name for name, way in WAYS.items() if way.method or not way.both]
"""Those that end with one layer of the original's size."""


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
            for choice in units.merges(calm, analytic_DI, kept, asked, keys)[1]:
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
    lam = ridge * float(moments.inputs_II.diagonal().mean())
    eye_II = torch.eye(len(moments.inputs_II)).to(moments.inputs_II)
    return replace(
        moments,
        inputs_II=moments.inputs_II + lam * eye_II,
        cross_OI=moments.cross_OI + lam * prior_OI,
    )


@dataclass(frozen=True)
class Judge:
    """Two texts, windows behind those that are fitted on, and what the original says of them."""

    stack: Stack
    texts: Mapping[str, slice]

    @torch.no_grad()
    def row(self, stream_NLD: Tensor, layers: Sequence[int] = ()) -> dict[str, float]:
        """KL divergence and perplexity once these layers of the original have followed."""
        found: dict[str, float] = {}
        judged_NLD = stream_NLD[len(self.stack.fitted_NL) :]
        for number in layers:
            layer = self.stack.original.layer(number)
            for sublayer in layer.family.sublayers:
                judged_NLD = layer.after(sublayer, judged_NLD)
        for name, some in self.texts.items():
            theirs_NLD = self.stack.streams[-1][len(self.stack.fitted_NL) :][some]
            kl, nll, count = 0.0, 0.0, 0
            said = zip(self.stack.judged_NL[some], theirs_NLD, judged_NLD[some], strict=True)
            for tokens_L, theirs_LD, ours_LD in said:
                theirs_LV, ours_LV = (
                    log_softmax(self.stack.head.logits(x_LD), -1) for x_LD in (theirs_LD, ours_LD)
                )
                kl += float(kl_div(ours_LV, theirs_LV, reduction="batchmean", log_target=True))
                nll += float(nll_loss(ours_LV[:-1], tokens_L[1:]))
                count += 1
            found |= {f"{name}KL": kl / count, f"{name}perplexity": math.exp(nll / count)}
        return found


app = typer.Typer()


@app.command()
def pairs(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    test: Annotated[str, typer.Option(help="Text of its domain.")],
    other: Annotated[str, typer.Option(help="Text of another domain.")],
    pair: Annotated[list[int] | None, typer.Option(help="First of a pair; repeat it.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Layers that leave together, 15,14; repeat it.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A way; repeat it.")] = None,
    windows: Annotated[int, typer.Option(help="To fit on.")] = 32,
    judged: Annotated[int, typer.Option(help="Of each text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    out: Out = RESULTS,
) -> None:
    """Make one layer of two, in every way: one pair at a time, and many of them."""
    if strange := set(only or ()) - set(WAYS):
        raise typer.BadParameter(f"--only {sorted(strange)[0]} is none of {', '.join(WAYS)}")
    stack, judge = _opened(model, calib, {"": test, "other ": other}, windows, judged, length)
    notes = Notes(out / ".pairs.jsonl")
    rows: Table = []
    for tried in _tried(stack.original.sizes.num_layers, without or (), pair or ()):
        for name in (way for way in tried.ways if way in (only or WAYS)):
            if name not in notes.read(tried.what):
                start = time.perf_counter()
                row = judge.row(*_made(stack, tried.groups, WAYS[name], repaired=tried.repaired))
                row["seconds"] = time.perf_counter() - start
                notes.add({"budget": tried.what, "step": name, "row": row})
                typer.echo(json.dumps({"layers": tried.what, "way": name, **row}), err=True)
            row = notes.read(tried.what)[name]["row"]
            rows.append({"layers": tried.what, "way": name, **row})
    protocol = PROTOCOL.format(
        model=model.name, windows=windows, judged=judged, length=length, calm=CALM
    )
    save(out / "pairs", "One layer made of two", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model}, fitted on {windows} windows of {length} tokens. KL divergence from the
original (nats per token) and perplexity on {judged} windows of each of two texts: of the
calibration's domain, and of another one. A single pair is followed by the original's layers as they
are; behind the first of many every layer has its readers and writers refitted. Of a block of more
than two layers the first and the last are laid side by side. Units are chosen under a ridge of
{calm}."""


@dataclass(frozen=True)
class Tried:
    """Layers of the original that become one, for every layer that is made.

    Attributes:
        repaired: whether readers and writers of the layers that follow are fitted.
    """

    what: str
    groups: Sequence[tuple[int, ...]]
    ways: Iterable[str]
    repaired: bool


def _opened(
    model: Path, calib: str, judged_by: Mapping[str, str], windows: int, judged: int, length: int
) -> tuple[Stack, Judge]:
    """The original behind its windows.

    Raises:
        UsageError: of a class whose sublayers cannot be laid side by side here.
    """
    source, cpu = open_source(model), torch.device("cpu")
    family, sizes = read_model(source.config)
    if not family.rotates or sizes.biases or any(sub.inner_norms for sub in family.sublayers):
        raise UsageError(
            f"{family.architecture} has norms behind its matrices, or biases; pairs are tried on a "
            "class without them: take a Llama or a Mistral"
        )

    def read(text: str, count: int) -> Tensor:
        return token_windows(model, TextOptions(source=text, samples=count, seqlen=length))

    texts = {name: read(text, judged) for name, text in judged_by.items()}
    original = Original(source, family, sizes, Stock.of(source.config, cpu), cpu)
    stack = Stack(original, read(calib, windows), torch.cat(list(texts.values())))
    ends = accumulate(map(len, texts.values()), initial=0)
    return stack, Judge(stack, dict(zip(texts, starmap(slice, pairwise(ends)), strict=True)))


def _tried(count: int, without: Sequence[str], firsts: Sequence[int]) -> Iterator[Tried]:
    for gone in without:
        left = {int(layer) for layer in gone.split(",")}
        if not left <= set(range(1, count)):
            raise typer.BadParameter(f"--without {gone}: layers 1 to {count - 1} can leave")
        yield Tried(f"without {gone}", _groups(left, count), NARROWED, True)
    for first in firsts:
        if not 0 <= first < count - 1:
            raise typer.BadParameter(f"--pair {first}: pairs start with 0 to {count - 2}")
        yield Tried(f"{first} and {first + 1}", _groups({first + 1}, count), WAYS, False)


def _groups(gone: Collection[int], count: int) -> list[tuple[int, ...]]:
    """Every layer that stays, with those behind it that leave."""
    kept = [layer for layer in range(count) if layer not in gone]
    return [tuple(range(a, b)) for a, b in pairwise([*kept, count])]


def _made(
    stack: Stack, groups: Sequence[tuple[int, ...]], way: Way, *, repaired: bool
) -> tuple[Tensor, Sequence[int]]:
    """The stream behind what was made, and the original's layers that follow as they are."""
    merger = Merger(stack)
    start = next(place for place, layers in enumerate(groups) if len(layers) > 1)
    stream_NLD = stack.streams[groups[start][0]]
    for place in range(start, len(groups)):
        layers = groups[place]
        if len(layers) == 1 and not repaired:
            return stream_NLD, [single for (single,) in groups[place:]]
        stream_NLD = merger.behind(layers, stream_NLD, way if len(layers) > 1 else WAYS[DROPPED])
    return stream_NLD, ()


if __name__ == "__main__":
    app()
