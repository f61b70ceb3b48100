"""Layer by layer: neurons chosen and merged, writers refitted so that the narrowed model says at
every norm what the original says there.

Writers are solved by least squares on what the narrowed model feeds them, with their biases where
they have one: the target is what the original's norm reads, less what stands in the narrowed
stream, so that the drift of earlier layers is in it. Tokens count by 1/sigma of what the norm
divides them by.

A layer that is left out is answered for by the one before it, which aims at what the left one
said and takes over the norm behind it, if there is one.

Shapes: T tokens, D width of the stream, N neurons before, K after, I inputs of a writer and a one
for its bias, S blocks of a reader's rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder, layers_of
from dotexport.encoders.kinds import of_layers
from dotexport.encoders.sentences import Batch
from dotexport.merging.neurons import Alike, Merge, choose, importance, loosened
from dotexport.merging.ot.cost import activation_distance, cosine, same_sign_distance
from dotexport.merging.ot.coupling import couple
from dotexport.merging.refit import Fit, Moments, fit
from dotexport.merging.transport_options import TransportOptions

Progress = Callable[[str, int, int], None]


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Stream:
    """What reaches a layer for one batch, and what the original calls each of its layers with
    besides: masks, and positions, which are not the same for all."""

    hidden: Tensor
    calls: list[Call]
    batch: Batch

    def through(self, layer: nn.Module, number: int) -> Tensor:
        """Behind a layer that stands where the original has this one."""
        args, kwargs = self.calls[number]
        return _hidden(layer(self.hidden, *args, **kwargs))


@dataclass(frozen=True)
class Walked:
    """A narrowed model, and how well each writer was refitted."""

    model: nn.Module
    sites: list[dict[str, Any]]


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
    theirs = list(_starts(encoder, some))
    ours = [replace(stream) for stream in theirs]
    ends = [*kept_layers[1:], len(encoder.layers)]
    sites = []
    for place, layer in enumerate(layers):
        progress("narrowing", place, len(layers))
        group = range(kept_layers[place], ends[place])
        site = _Site(encoder, layer, group, ours, _originals(encoder, group, theirs))
        sites.append({"layer": group[0], **site.narrow(width, method)})
        for stream in ours:
            stream.hidden = stream.through(layer, group[0])
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
    for word, value in of_layers(encoder.config, kept_layers).items():
        setattr(model.config, word, value)
    return model


def _starts(encoder: Encoder, some: Sequence[Batch]) -> Iterator[Stream]:
    """What the first layer reads, and how the model calls each, batch by batch."""
    read: list[Tensor] = []
    calls: list[Call] = []

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            read.append(args[0])
        calls.append((args[1:], kwargs))

    handles = [x.register_forward_pre_hook(take, with_kwargs=True) for x in encoder.layers]
    try:
        for batch in some:
            encoder.base(**batch.inputs)
            yield Stream(read.pop(), calls.copy(), batch)
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()


def _hidden(made: Any) -> Tensor:
    """The stream, of what a module says."""
    hidden: Tensor = made[0] if isinstance(made, tuple) else made
    return hidden


Sums = tuple[Moments, Moments]
"""Over tokens that are fitted, and over those that judge."""


def _zeros(writer: nn.Linear, width: int | None = None) -> Sums:
    """Args: width: inputs, where they are not the writer's own."""
    inputs = (width or writer.in_features) + (writer.bias is not None)
    train, held = (Moments.zeros(inputs, writer.out_features) for _ in range(2))
    return train, held


@dataclass(frozen=True)
class _Read:
    """What an MLP reads of one batch, what a writer of its layer is to say then, and what both
    count there."""

    x_TD: Tensor
    target_TD: Tensor
    weight_T1: Tensor
    held: bool

    def add(self, sums: Sums, writer: nn.Linear, z_TI: Tensor) -> None:
        """Args: z_TI: what the writer reads."""
        if writer.bias is not None:
            z_TI = torch.cat([z_TI, torch.ones_like(z_TI[:, :1])], dim=1)
        sums[self.held].add(z_TI * self.weight_T1, self.target_TD)


@dataclass(frozen=True)
class _Original:
    """What the original's norms read of one batch, (T, D): behind the attention of the first of a
    group of layers, and behind the MLP of the last."""

    attention_TD: Tensor
    mlp_TD: Tensor


def _originals(encoder: Encoder, group: range, theirs: Sequence[Stream]) -> list[_Original]:
    """Of every batch; its stream is behind these layers then."""
    kind, found = encoder.kind, []
    for stream in theirs:
        read = []
        for number in group:
            layer = encoder.layers[number]
            with _seen(layer, {kind.attention_norm, kind.norm}) as seen:
                stream.hidden = stream.through(layer, number)
            read.append([_behind(seen, norm) for norm in (kind.attention_norm, kind.norm)])
        found.append(_Original(read[0][0][stream.batch.mask], read[-1][1][stream.batch.mask]))
    return found


@dataclass
class _Site:
    """One layer of the narrowed model, and what those of the original that it stands for (by their
    numbers) say."""

    encoder: Encoder
    layer: nn.Module
    group: range
    ours: list[Stream]
    theirs: list[_Original]

    def narrow(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = _linear(self.layer, kind.writer)
        if method == "select":
            seen, _ = self._sums(kind.writer, kind.norm, [x.mlp_TD for x in self.theirs])
            kept = choose("select", _given_bias(seen[0], writer), writer.weight.detach(), width)
            self._put(Merge(kept), _with_bias(writer)[:, _and_bias(kept, writer)])
            return {"kept": len(kept)}
        attention = _linear(self.layer, kind.attention)
        sums, _ = self._sums(
            kind.attention, kind.attention_norm, [x.attention_TD for x in self.theirs]
        )
        fitted = fit(*sums, _with_bias(attention))
        _put(attention, *_split(attention, fitted.weights_OI))
        return {"attention": fitted.as_dict(), "mlp": self._narrow_mlp(width, method)}

    def _narrow_mlp(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = _linear(self.layer, kind.writer)
        prior_DI = _with_bias(writer).double()
        (train, held), read = self._sums(kind.writer, kind.norm, [x.mlp_TD for x in self.theirs])
        kept = choose("obs", _given_bias(train, writer), writer.weight.detach(), width)
        merges = [Merge(kept)]
        if method == "dot" and width < writer.in_features:
            turns = "up" in kind.spaces  # what multiplies may change its sign
            merges += _merges(train.of(_all(writer)), writer.weight.detach(), kept, turns=turns)
        trials = [(train.of(_and_bias(kept, writer)), held.of(_and_bias(kept, writer)))]
        trials += [self._sums_merged(merge, read) for merge in merges[1:]]
        prior_DK = prior_DI[:, _and_bias(kept, writer)]
        fits: list[Fit] = [fit(*trial, prior_DK) for trial in trials]
        best = min(range(len(fits)), key=lambda n: fits[n].error)
        self._put(merges[best], fits[best].weights_OI)
        if kind.norm:
            theirs = self.encoder.layers[self.group[-1]].get_submodule(kind.norm)
            self.layer.get_submodule(kind.norm).load_state_dict(theirs.state_dict())
        return {**fits[best].as_dict(), "moved": merges[best].moved}

    def _sums(self, writer: str, norm: str, wanted: Sequence[Tensor]) -> tuple[Sums, list[_Read]]:
        """For what enters a writer and a one for its bias; and what the MLP reads meanwhile."""
        kind, linear = self.encoder.kind, _linear(self.layer, writer)
        sums, read = _zeros(linear), []
        for stream, wanted_TD in zip(self.ours, wanted, strict=True):
            with _seen(self.layer, {writer, norm, kind.reader}) as seen:
                stream.through(self.layer, self.group[0])
            mask_NL = stream.batch.mask
            before_TD = (_behind(seen, norm) - seen[writer][1])[mask_NL]
            weight_T1 = 1 / wanted_TD.std(-1, keepdim=True).clamp_min(1e-6)
            one = _Read(
                seen[kind.reader][0][mask_NL],
                (wanted_TD - before_TD) * weight_T1,
                weight_T1,
                held=stream.batch.held,
            )
            one.add(sums, linear, seen[writer][0][mask_NL])
            read.append(one)
        return sums, read

    def _sums_merged(self, merge: Merge, read: Sequence[_Read]) -> Sums:
        """The same as if the reader had these rows."""
        writer = _linear(self.layer, self.encoder.kind.writer)
        sums = _zeros(writer, len(merge.kept))
        for one in read:
            one.add(sums, writer, self._merged(merge, one.x_TD))
        return sums

    def _merged(self, merge: Merge, x_TD: Tensor) -> Tensor:
        """What merged neurons say."""
        kind, (rows_XI, bias_X) = self.encoder.kind, self._mixed(merge)
        read_STK = nn.functional.linear(x_TD, rows_XI, bias_X).chunk(len(kind.spaces), dim=-1)
        said_TK: Tensor = self.layer.get_submodule(kind.activation)(read_STK[0])
        for factor_TK in read_STK[1:]:
            said_TK = said_TK * factor_TK
        return said_TK

    def _mixed(self, merge: Merge) -> tuple[Tensor, Tensor | None]:
        """Rows and biases of the reader, S blocks of K instead of N."""
        spaces, reader = self.encoder.kind.spaces, _linear(self.layer, self.encoder.kind.reader)
        blocks_SND = _with_bias(reader).chunk(len(spaces))
        parts = [merge.rows(x, rows_ND) for x, rows_ND in zip(spaces, blocks_SND, strict=True)]
        return _split(reader, torch.cat(parts))

    def _put(self, merge: Merge, weights_DI: Tensor) -> None:
        """The MLP with K neurons."""
        reader = _linear(self.layer, self.encoder.kind.reader)
        writer = _linear(self.layer, self.encoder.kind.writer)
        _put(reader, *self._mixed(merge))
        _put(writer, *_split(writer, weights_DI))


def _merges(train: Moments, writer_DN: Tensor, kept: Tensor, *, turns: bool) -> list[Merge]:
    """From strict to loose, those that move more than the one before.

    Args:
        turns: a neuron may stand for another one upside down.
    """
    gram_NN, kept_K = train.inputs.full().numpy(), kept.numpy()
    cost = (activation_distance if turns else same_sign_distance)(gram_NN, kept_K)
    coupling = couple(cost, importance(train, writer_DN).numpy(), TransportOptions())
    alike = Alike.of(kept, coupling.mass_N, [(cosine(gram_NN, kept_K), coupling)])
    return list(loosened(alike))


def _all(writer: nn.Linear) -> Tensor:
    return torch.arange(writer.in_features)


def _and_bias(kept: Tensor, writer: nn.Linear) -> Tensor:
    """The kept neurons, and the one that stands for the bias."""
    if writer.bias is None:
        return kept
    return torch.cat([kept, torch.tensor([writer.in_features])])


def _given_bias(moments: Moments, writer: nn.Linear) -> Moments:
    """Covariances where the writer has a bias."""
    return moments if writer.bias is None else moments.given_last()


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return layer.get_submodule(name)  # type: ignore[return-value]


def _with_bias(linear: nn.Linear) -> Tensor:
    if linear.bias is None:
        return linear.weight.detach()
    return torch.cat([linear.weight.detach(), linear.bias.detach()[:, None]], dim=1)


def _split(linear: nn.Linear, weights_OI: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias if it has one."""
    weights_OI = weights_OI.float()
    if linear.bias is None:
        return weights_OI, None
    return weights_OI[:, :-1], weights_OI[:, -1]


def _put(linear: nn.Linear, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """The same module with these."""
    linear.weight = nn.Parameter(weight_OI.clone())
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.clone())
    linear.out_features, linear.in_features = weight_OI.shape


def _behind(seen: Mapping[str, tuple[Tensor, Tensor]], norm: str) -> Tensor:
    """The stream behind a sublayer: what its norm reads, or what leaves the layer."""
    read, said = seen[norm]
    return read if norm else said


class _seen:  # noqa: N801  a context
    """What modules of a layer read and say: name -> (input, output)."""

    def __init__(self, layer: nn.Module, names: set[str]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.handles = [
            layer.get_submodule(name).register_forward_hook(self._taker(name)) for name in names
        ]

    def _taker(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self.found[name] = (inputs[0], _hidden(output))

        return take

    def __enter__(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.found

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
