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

from dotexport.encoders import encoder_stream
from dotexport.encoders.encoder_folder import Encoder, layers_of
from dotexport.encoders.kinds import of_layers
from dotexport.encoders.linear import (
    Sums,
    and_bias,
    given_bias,
    hidden,
    linear_of,
    put,
    split,
    sums_of,
    watched,
    with_bias,
    with_one,
)
from dotexport.encoders.pooling import Pooling
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
    """What reaches a layer for one batch, what the original calls its embeddings with, and each of
    its layers besides: masks, and positions, which are not the same for all."""

    hidden: Tensor
    embedded: Call
    calls: list[Call]
    batch: Batch

    def through(self, layer: nn.Module, number: int) -> Tensor:
        """Behind a layer that stands where the original has this one."""
        args, kwargs = self.calls[number]
        return hidden(layer(self.hidden, *args, **kwargs))


@dataclass(frozen=True)
class Walked:
    """A narrowed model, and how well each writer was refitted.

    Attributes:
        back: from its stream to the original's, (D, K); None: they are as wide.
    """

    model: nn.Module
    sites: list[dict[str, Any]]
    back: nn.Linear | None = None


@torch.no_grad()
def walk(
    encoder: Encoder,
    some: Sequence[Batch],
    kept_layers: Sequence[int],
    width: int,
    method: str,
    progress: Progress = lambda stage, done, total: None,
    *,
    dimensions: Tensor | None = None,
    pooling: Pooling | None = None,
) -> Walked:
    """The narrowed model; the original is left as it is.

    Args:
        kept_layers: ascending, the first layer among them.
        dimensions: of the stream, those that stay, (K,) ascending; None: all do.
        pooling: of what the way back to all of them is fitted; None: the mean.
    """
    model = cut(encoder, kept_layers)
    layers = layers_of(model, encoder.kind)
    theirs = list(_starts(encoder, some))
    ours = [replace(stream) for stream in theirs]
    if dimensions is not None:
        encoder_stream.select(model, encoder.kind, dimensions)
        _embed(model, ours, dimensions, follows=method != "select")
    ends = [*kept_layers[1:], len(encoder.layers)]
    sites = []
    for place, layer in enumerate(layers):
        progress("narrowing", place, len(layers))
        group = range(kept_layers[place], ends[place])
        originals = _originals(encoder, group, theirs, whole=dimensions is not None)
        site = _Site(encoder, layer, group, ours, originals, dimensions)
        sites.append({"layer": group[0], **site.narrow(width, method)})
        for stream in ours:
            stream.hidden = stream.through(layer, group[0])
    setattr(model.config, encoder.kind.width, width)
    back = None
    if dimensions is not None:
        last = encoder_stream.Last.of(encoder, model, some, dimensions)
        back = last.back(pooling or Pooling())
        encoder_stream.end(encoder, model, last, method)
        model = encoder_stream.rebuilt(encoder, model, len(dimensions), width)
    progress("narrowing", len(layers), len(layers))
    return Walked(model, sites, back)


def _embed(model: nn.Module, ours: Sequence[Stream], kept_K: Tensor, *, follows: bool) -> None:
    """Streams of a model with fewer dimensions; they arrive as the original's."""
    embeddings: nn.Module = model.base_model.embeddings  # type: ignore[union-attr,assignment]
    norm = next(n for n, part in embeddings.named_modules() if isinstance(part, nn.LayerNorm))
    pairs = []
    for stream in ours:
        args, kwargs = stream.embedded
        wanted, mask_NL = stream.hidden[..., kept_K], stream.batch.mask
        with watched(embeddings, {norm}) as found:
            stream.hidden = hidden(embeddings(*args, **kwargs))
        if not stream.batch.held:
            pairs.append((found[norm][0][mask_NL], wanted[mask_NL]))
    if follows:
        encoder_stream.follow(embeddings.get_submodule(norm), pairs)  # type: ignore[arg-type]
        for stream in ours:
            args, kwargs = stream.embedded
            stream.hidden = hidden(embeddings(*args, **kwargs))


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
    embedded: list[Call] = []

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            read.append(args[0])
        calls.append((args[1:], kwargs))

    def take_embedded(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedded.append((args, kwargs))

    embeddings: nn.Module = encoder.base.embeddings  # type: ignore[assignment]
    handles = [x.register_forward_pre_hook(take, with_kwargs=True) for x in encoder.layers]
    handles.append(embeddings.register_forward_pre_hook(take_embedded, with_kwargs=True))
    try:
        for batch in some:
            encoder.base(**batch.inputs)
            yield Stream(read.pop(), embedded.pop(), calls.copy(), batch)
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()


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
        z_TI = with_one(z_TI, biased=writer.bias is not None)
        sums[self.held].add(z_TI * self.weight_T1, self.target_TD)


@dataclass(frozen=True)
class _Original:
    """What the original's norms read of one batch, (T, D): behind the attention of the first of a
    group of layers, and behind the MLP of the last.

    Attributes:
        reads: what attention and MLP of the first read; where the stream gets narrower, as below.
        says: what these norms say.
    """

    attention_TD: Tensor
    mlp_TD: Tensor
    reads: tuple[Tensor, ...] = ()
    says: tuple[Tensor, ...] = ()


def _originals(
    encoder: Encoder, group: range, theirs: Sequence[Stream], *, whole: bool
) -> list[_Original]:
    """Of every batch; its stream is behind these layers then."""
    kind, found = encoder.kind, []
    norms = (kind.attention_norm, kind.norm)
    readers = (encoder_stream.attention_readers(encoder.layers[group[0]], kind)[0], kind.reader)
    for stream in theirs:
        read, mask_NL = [], stream.batch.mask
        for number in group:
            layer = encoder.layers[number]
            with watched(layer, {*norms, *readers}) as seen:
                stream.hidden = stream.through(layer, number)
            read.append(seen)
        first, last = read[0], read[-1]
        behind = (_behind(first, norms[0])[mask_NL], _behind(last, norms[1])[mask_NL])
        more: list[tuple[Tensor, ...]] = []
        if whole:
            more.append(tuple(first[name][0][mask_NL] for name in readers))
            more.append((first[norms[0]][1][mask_NL], last[norms[1]][1][mask_NL]))
        found.append(_Original(*behind, *more))
    return found


@dataclass
class _Site:
    """One layer of the narrowed model, and what those of the original that it stands for (by their
    numbers) say.

    Attributes:
        kept_K: dimensions of the stream that stay; None: all do.
    """

    encoder: Encoder
    layer: nn.Module
    group: range
    ours: list[Stream]
    theirs: list[_Original]
    kept_K: Tensor | None = None

    def narrow(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = linear_of(self.layer, kind.writer)
        if method == "select":
            if self.kept_K is not None:
                self._leave_heads_out(method)
            (train, _), _ = self._sums(kind.writer, kind.norm, [x.mlp_TD for x in self.theirs])
            kept = choose("select", given_bias(train, writer), writer.weight.detach(), width)
            self._put(Merge(kept), with_bias(writer)[:, and_bias(kept, writer)])
            return {"kept": len(kept)}
        attention = self._narrow_attention(method)
        return {"attention": attention, "mlp": self._narrow_mlp(width, method)}

    def _narrow_attention(self, method: str) -> dict[str, Any]:
        """Everything up to what the MLP reads."""
        kind = self.encoder.kind
        attention = linear_of(self.layer, kind.attention)
        if self.kept_K is None:
            wanted = [x.attention_TD for x in self.theirs]
            sums, _ = self._sums(kind.attention, kind.attention_norm, wanted)
            fitted = fit(*sums, with_bias(attention))
            put(attention, *split(attention, fitted.weights_OI))
            return fitted.as_dict()
        readers = encoder_stream.attention_readers(self.layer, kind)
        read = self._read_anew(readers, 0)
        fitted = self._leave_heads_out(method)
        self._follow(kind.attention_norm, 0)
        return {**fitted.as_dict(), "read": read, "mlp_read": self._read_anew([kind.reader], 1)}

    def _read_anew(self, readers: Sequence[str], which: int) -> float:
        """What these read is a function of the narrower stream; returns the error."""
        ours = []
        for stream in self.ours:
            with watched(self.layer, set(readers[:1])) as seen:
                stream.through(self.layer, self.group[0])
            ours.append(seen[readers[0]][0][stream.batch.mask])
        assert self.kept_K is not None
        original = self.encoder.layers[self.group[0]]
        lift = encoder_stream.Lift.between(
            ours,
            [x.reads[which] for x in self.theirs],
            [stream.batch.held for stream in self.ours],
            self.kept_K,
            biased=linear_of(original, readers[0]).bias is not None,
        )
        for name in readers:
            put(linear_of(self.layer, name), *lift.through(linear_of(original, name)))
        return lift.error

    def _leave_heads_out(self, method: str) -> Fit:
        """As many heads as the stream has room for, and their writer fitted."""
        assert self.kept_K is not None
        kind, size = self.encoder.kind, encoder_stream.head_dim(self.encoder)
        writer, count = linear_of(self.layer, kind.attention), len(self.kept_K) // size
        wanted = [x.attention_TD for x in self.theirs]
        (train, held), _ = self._sums(kind.attention, kind.attention_norm, wanted)
        columns = encoder_stream.choose_heads(method, train, writer, size, count)
        kept = and_bias(columns, writer)
        prior_DK = with_bias(writer)[:, kept]
        fitted = Fit.unchanged(prior_DK.double(), held.of(kept))
        if method != "select":
            fitted = fit(train.of(kept), held.of(kept), prior_DK)
        encoder_stream.leave_heads_out(self.layer, kind, columns, count)
        put(writer, *split(writer, fitted.weights_OI))
        return fitted

    def _follow(self, name: str, which: int) -> None:
        """The norm behind a sublayer says what the original's does; there is none in pre-norm."""
        if not self.encoder.kind.norm:
            return
        pairs = []
        for stream, theirs in zip(self.ours, self.theirs, strict=True):
            if stream.batch.held:
                continue
            with watched(self.layer, {name}) as seen:
                stream.through(self.layer, self.group[0])
            pairs.append((seen[name][0][stream.batch.mask], theirs.says[which][:, self.kept_K]))
        encoder_stream.follow(self.layer.get_submodule(name), pairs)  # type: ignore[arg-type]

    def _narrow_mlp(self, width: int, method: str) -> dict[str, Any]:
        kind = self.encoder.kind
        writer = linear_of(self.layer, kind.writer)
        prior_DI = with_bias(writer).double()
        (train, held), read = self._sums(kind.writer, kind.norm, [x.mlp_TD for x in self.theirs])
        kept = choose("obs", given_bias(train, writer), writer.weight.detach(), width)
        merges = [Merge(kept)]
        if method == "dot" and width < writer.in_features:
            turns = "up" in kind.spaces  # what multiplies may change its sign
            merges += _merges(train.of(_all(writer)), writer.weight.detach(), kept, turns=turns)
        trials = [(train.of(and_bias(kept, writer)), held.of(and_bias(kept, writer)))]
        trials += [self._sums_merged(merge, read) for merge in merges[1:]]
        prior_DK = prior_DI[:, and_bias(kept, writer)]
        fits: list[Fit] = [fit(*trial, prior_DK) for trial in trials]
        best = min(range(len(fits)), key=lambda n: fits[n].error)
        self._put(merges[best], fits[best].weights_OI)
        if kind.norm:
            if self.kept_K is None:
                theirs = self.encoder.layers[self.group[-1]].get_submodule(kind.norm)
                self.layer.get_submodule(kind.norm).load_state_dict(theirs.state_dict())
            else:
                self._follow(kind.norm, 1)
        return {**fits[best].as_dict(), "moved": merges[best].moved}

    def _sums(self, writer: str, norm: str, wanted: Sequence[Tensor]) -> tuple[Sums, list[_Read]]:
        """For what enters a writer and a one for its bias; and what the MLP reads meanwhile."""
        kind, linear = self.encoder.kind, linear_of(self.layer, writer)
        sums, read = _zeros(linear, linear.in_features), []
        for stream, wanted_TD in zip(self.ours, wanted, strict=True):
            with watched(self.layer, {writer, norm, kind.reader}) as seen:
                stream.through(self.layer, self.group[0])
            mask_NL = stream.batch.mask
            before_TD = (_behind(seen, norm) - seen[writer][1])[mask_NL]
            weight_T1 = 1 / wanted_TD.std(-1, keepdim=True).clamp_min(1e-6)
            if self.kept_K is not None:
                wanted_TD = wanted_TD[:, self.kept_K]
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
        writer = linear_of(self.layer, self.encoder.kind.writer)
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
        spaces, reader = self.encoder.kind.spaces, linear_of(self.layer, self.encoder.kind.reader)
        blocks_SND = with_bias(reader).chunk(len(spaces))
        parts = [merge.rows(x, rows_ND) for x, rows_ND in zip(spaces, blocks_SND, strict=True)]
        return split(reader, torch.cat(parts))

    def _put(self, merge: Merge, weights_DI: Tensor) -> None:
        """The MLP with K neurons."""
        reader = linear_of(self.layer, self.encoder.kind.reader)
        writer = linear_of(self.layer, self.encoder.kind.writer)
        put(reader, *self._mixed(merge))
        put(writer, *split(writer, weights_DI))


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


def _zeros(writer: nn.Linear, inputs: int) -> Sums:
    return sums_of(inputs, writer.out_features, biased=writer.bias is not None)


def _all(writer: nn.Linear) -> Tensor:
    return torch.arange(writer.in_features)


def _behind(seen: Mapping[str, tuple[Tensor, Tensor]], norm: str) -> Tensor:
    """The stream behind a sublayer: what its norm reads, or what leaves the layer."""
    read, said = seen[norm]
    return read if norm else said
