"""Layer by layer: neurons chosen and merged, writers refitted so that the narrowed model says at
every norm what the original says there.

Writers are solved with their biases, by least squares on what the narrowed model feeds them:
the target is what the original's norm reads, less what stands in the narrowed stream, so that the
drift of earlier layers is in it. Tokens count by 1/sigma of what the norm divides them by.

A layer that is left out is answered for by the one before it, which aims at what the left one
said and takes over its norm.

Shapes: T tokens, D width of the stream, N neurons before, K after, I inputs of a writer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder, layers_of
from dotexport.encoders.sentences import Batch
from dotexport.merging.neurons import MERGE_LEVELS, Merge, barycentres, choose, importance
from dotexport.merging.ot.cost import same_sign_distance
from dotexport.merging.ot.coupling import couple
from dotexport.merging.refit import Fit, Moments, fit
from dotexport.merging.transport_options import TransportOptions

Progress = Callable[[str, int, int], None]


@dataclass
class Stream:
    """What reaches a layer for one batch, and how it is called."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Batch

    def through(self, layer: nn.Module) -> Tensor:
        made = layer(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = made[0] if isinstance(made, tuple) else made
        return hidden


@dataclass(frozen=True)
class Walked:
    """A narrowed model, and how well each writer was refitted."""

    model: nn.Module
    sites: list[dict[str, Any]]


class _Enough(Exception):  # noqa: N818  ends a forward pass, no error
    pass


@torch.no_grad()
def walk(
    encoder: Encoder,
    some: Sequence[Batch],
    kept_layers: Sequence[int],
    width: int,
    method: str,
    progress: Progress = lambda stage, done, total: None,
) -> Walked:
    """The narrowed model; the original is left as it is.

    Args:
        kept_layers: ascending, the first layer among them.
    """
    model = cut(encoder, kept_layers)
    layers = layers_of(model, encoder.kind)
    theirs = list(_starts(encoder.base, encoder.layers[0], some))
    ours = [replace(stream) for stream in theirs]
    ends = [*kept_layers[1:], len(encoder.layers)]
    sites = []
    for place, layer in enumerate(layers):
        progress("narrowing", place, len(layers))
        group = [encoder.layers[n] for n in range(kept_layers[place], ends[place])]
        site = _Site(encoder, layer, group, ours, theirs)
        sites.append({"layer": kept_layers[place], **site.narrow(width, method)})
        for stream in ours:
            stream.hidden = stream.through(layer)
        for stream in theirs:
            for original in group:
                stream.hidden = stream.through(original)
    setattr(model.config, encoder.kind.width, width)
    progress("narrowing", len(layers), len(layers))
    return Walked(model, sites)


def cut(encoder: Encoder, kept_layers: Sequence[int]) -> nn.Module:
    """A copy with these layers alone."""
    model = copy.deepcopy(encoder.model)
    owner, _, name = encoder.kind.stack.rpartition(".")
    base: Any = model.base_model
    stack = base.get_submodule(owner)
    setattr(stack, name, nn.ModuleList([getattr(stack, name)[n] for n in kept_layers]))
    setattr(model.config, encoder.kind.depth, len(kept_layers))
    return model


def _starts(base: nn.Module, first: nn.Module, some: Sequence[Batch]) -> Iterator[Stream]:
    """What the first layer is called with, batch by batch."""
    seen: list[Any] = []

    def take(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Enough

    handle = first.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for batch in some:
            try:
                base(**batch.inputs)
            except _Enough:
                (hidden, *args), kwargs = seen.pop()
                yield Stream(hidden, tuple(args), kwargs, batch)
    finally:
        handle.remove()


@dataclass
class _Site:
    """One layer of the narrowed model beside those of the original that it stands for."""

    encoder: Encoder
    layer: nn.Module
    group: list[nn.Module]
    ours: list[Stream]
    theirs: list[Stream]

    def narrow(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = _linear(self.layer, kind.writer)
        if method == "select":
            seen = self._moments(kind.writer, kind.norm, self._reads(kind.norm), [None])
            kept = choose("select", seen[0][0].given_last(), writer.weight.detach(), width)
            self._put(Merge(kept), writer.weight.detach()[:, kept], writer.bias.detach())
            return {"kept": len(kept)}
        attention = _linear(self.layer, kind.attention)
        wanted = self._reads(kind.attention_norm, first=True)
        trials = self._moments(kind.attention, kind.attention_norm, wanted, [None])
        fitted = fit(*trials[0], _with_bias(attention))
        _put(attention, fitted.weights_OI)
        return {"attention": fitted.as_dict(), "mlp": self._narrow_mlp(width, method)}

    def _narrow_mlp(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = _linear(self.layer, kind.writer)
        wanted = self._reads(kind.norm)
        prior_DI = _with_bias(writer).double()
        whole = self._moments(kind.writer, kind.norm, wanted, [None])
        train, held = whole[0]
        kept = choose("obs", train.given_last(), writer.weight.detach(), width)
        merges = [Merge(kept)]
        if method == "dot" and width < writer.in_features:
            merges += _merges(train.of(_all(writer)), writer.weight.detach(), kept)
        trials = [(train.of(_and_last(kept, writer)), held.of(_and_last(kept, writer)))]
        if merges[1:]:
            trials += self._moments(kind.writer, kind.norm, wanted, merges[1:])
        prior_DK = prior_DI[:, _and_last(kept, writer)]
        fits: list[Fit] = [fit(*trial, prior_DK) for trial in trials]
        best = min(range(len(fits)), key=lambda n: fits[n].error)
        weights_DI = fits[best].weights_OI
        self._put(merges[best], weights_DI[:, :-1], weights_DI[:, -1])
        norm = self.layer.get_submodule(kind.norm)
        norm.load_state_dict(self.group[-1].get_submodule(kind.norm).state_dict())
        return {**fits[best].as_dict(), "moved": merges[best].moved}

    def _reads(self, norm: str, *, first: bool = False) -> list[Tensor]:
        """What the original's norm reads of every batch, (T, D); of the last layer it stands for,
        or of the `first`."""
        found = []
        for stream in self.theirs:
            here = replace(stream)
            for number, original in enumerate(self.group):
                with _seen(original, {norm}) as seen:
                    here.hidden = here.through(original)
                if number == (0 if first else len(self.group) - 1):
                    found.append(seen[norm][0][stream.batch.mask])
                    break
        return found

    def _moments(
        self, writer: str, norm: str, wanted: list[Tensor], merges: Sequence[Merge | None]
    ) -> list[tuple[Moments, Moments]]:
        """Sums over tokens that are fitted and over those that judge, for what enters a writer and
        a one; `merges`: as if the reader had these rows (None: its own)."""
        kind = self.encoder.kind
        outputs = _linear(self.layer, writer).out_features
        sums: list[tuple[Moments, Moments]] = []
        for stream, wanted_TD in zip(self.ours, wanted, strict=True):
            with _seen(self.layer, {writer, norm, kind.reader}) as seen:
                stream.through(self.layer)
            mask_NL = stream.batch.mask
            before_TD = (seen[norm][0] - seen[writer][1])[mask_NL]
            weight_T1 = 1 / wanted_TD.std(-1, keepdim=True).clamp_min(1e-6)
            target_TD = (wanted_TD - before_TD) * weight_T1
            for number, merge in enumerate(merges):
                z_TI = seen[writer][0][mask_NL]
                if merge is not None and merge.gate_KN is not None:
                    z_TI = self._merged(merge, seen[kind.reader][0][mask_NL])
                z_TI = torch.cat([z_TI, torch.ones_like(z_TI[:, :1])], dim=1) * weight_T1
                if number == len(sums):
                    zeros = [Moments.zeros(z_TI.shape[1], outputs) for _ in range(2)]
                    sums.append((zeros[0], zeros[1]))
                sums[number][int(stream.batch.held)].add(z_TI, target_TD)
        return sums

    def _merged(self, merge: Merge, x_TD: Tensor) -> Tensor:
        """What merged neurons say."""
        reader = _linear(self.layer, self.encoder.kind.reader)
        rows_KD = merge.rows("gate", reader.weight).float()
        bias_K = merge.rows("gate", reader.bias[:, None])[:, 0].float()
        activation = self.layer.get_submodule(self.encoder.kind.activation)
        said_TK: Tensor = activation(x_TD @ rows_KD.T + bias_K)
        return said_TK

    def _put(self, merge: Merge, weight_DK: Tensor, bias_D: Tensor) -> None:
        """The MLP with K neurons."""
        reader = _linear(self.layer, self.encoder.kind.reader)
        writer = _linear(self.layer, self.encoder.kind.writer)
        rows_KD = merge.rows("gate", reader.weight.detach()).float()
        bias_K = merge.rows("gate", reader.bias.detach()[:, None])[:, 0].float()
        reader.weight, reader.bias = nn.Parameter(rows_KD), nn.Parameter(bias_K)
        writer.weight = nn.Parameter(weight_DK.float().clone())
        writer.bias = nn.Parameter(bias_D.float().clone())
        reader.out_features = writer.in_features = len(rows_KD)


def _merges(train: Moments, writer_DN: Tensor, kept: Tensor) -> list[Merge]:
    """From strict to loose, those that move more than the one before."""
    gram_NN = train.inputs_II
    cost = same_sign_distance(gram_NN.numpy(), kept.numpy())
    coupling = couple(cost, importance(train, writer_DN).numpy(), TransportOptions())
    made, moved = [], 0.0
    for level in MERGE_LEVELS:
        merge = barycentres(gram_NN, coupling, kept, least_cosine=level)
        if merge.moved > moved:
            made.append(merge)
        moved = merge.moved
    return made


def _all(writer: nn.Linear) -> Tensor:
    return torch.arange(writer.in_features)


def _and_last(kept: Tensor, writer: nn.Linear) -> Tensor:
    """The kept neurons, and the one that stands for the bias."""
    return torch.cat([kept, torch.tensor([writer.in_features])])


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return layer.get_submodule(name)  # type: ignore[return-value]


def _with_bias(linear: nn.Linear) -> Tensor:
    return torch.cat([linear.weight.detach(), linear.bias.detach()[:, None]], dim=1)


def _put(linear: nn.Linear, weights_DI: Tensor) -> None:
    linear.weight.copy_(weights_DI[:, :-1])
    linear.bias.copy_(weights_DI[:, -1])


class _seen:  # noqa: N801  a context
    """What modules of a layer read and say: name -> (input, output)."""

    def __init__(self, layer: nn.Module, names: set[str]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.handles = [
            layer.get_submodule(name).register_forward_hook(self._taker(name)) for name in names
        ]

    def _taker(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.found[name] = (inputs[0], output)

        return take

    def __enter__(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.found

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
