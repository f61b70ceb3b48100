"""The table of docs/results/pairs.md: one layer made of two, beside leaving the second out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

from dotexport.app.opening import open_source
from dotexport.axes.plan import read_model
from dotexport.bench.tables.fidelity import Notes
from dotexport.bench.tables.result_files import (
    RESULTS,
    Calib,
    Other,
    Out,
    Table,
    Test,
    options_but,
    save,
)
from dotexport.bench.tables.side_by_side import CALM, MLP, Merger, Way
from dotexport.errors import UsageError
from dotexport.models.layers import Stock
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.depth import Stack
from dotexport.narrowing.original import Original

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
            judged_NLD = self.stack.original.layer(number).through(judged_NLD)
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
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    calib: Calib,
    test: Test,
    other: Other,
    pair: Annotated[list[int] | None, typer.Option(help="First of a pair; repeat it.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Layers that leave together, 15,14; repeat it.")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="A way for layers that leave together; repeat it.")
    ] = None,
    windows: Annotated[int, typer.Option(help="To fit on.")] = 32,
    judged: Annotated[int, typer.Option(help="Of each text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    out: Out = RESULTS,
) -> None:
    """Make one layer of two, in every way: one pair at a time, and many of them."""
    if strange := set(by or ()) - set(NARROWED):
        raise typer.BadParameter(f"--by {sorted(strange)[0]} is none of {', '.join(NARROWED)}")
    stack, judge = _opened(model, calib, {"": test, "other ": other}, windows, judged, length)
    notes = Notes(out / ".pairs.jsonl", options_but(context, "pair", "without", "by"))
    whole = judge.row(stack.streams[-1])
    rows: Table = [{"layers": "all", "way": "the original", **whole, "seconds": 0.0}]
    count = stack.original.sizes.num_layers
    for tried in _tried(count, without or (), by or NARROWED, pair or ()):
        for name in tried.ways:
            if name not in notes.read(tried.what):
                start = time.perf_counter()
                row = judge.row(*_made(stack, tried.groups, WAYS[name], repaired=tried.repaired))
                row["seconds"] = time.perf_counter() - start
                notes.add({"budget": tried.what, "step": name, "row": row})
                typer.echo(json.dumps({"layers": tried.what, "way": name, **row}), err=True)
            row = notes.read(tried.what)[name]["row"]
            rows.append({"layers": tried.what, "way": name, **row})
    protocol = PROTOCOL.format(
        model=model.name,
        calib=Path(calib).name,
        texts=" and of ".join(Path(text).name for text in (test, other)),
        windows=windows,
        judged=judged,
        length=length,
        calm=CALM,
    )
    save(out / "pairs", "One layer made of two", protocol, rows)
    notes.file.unlink()


PROTOCOL = """{model}, fitted on {windows} windows of {length} tokens of {calib}. KL divergence from
the original (nats per token) and perplexity on {judged} windows each of {texts}: of the
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


def _tried(
    count: int, without: Sequence[str], by: Sequence[str], firsts: Sequence[int]
) -> Iterator[Tried]:
    for gone in without:
        left = {int(layer) for layer in gone.split(",")}
        if not left <= set(range(1, count)):
            raise typer.BadParameter(f"--without {gone}: layers 1 to {count - 1} can leave")
        yield Tried(f"without {gone}", _groups(left, count), by, True)
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
