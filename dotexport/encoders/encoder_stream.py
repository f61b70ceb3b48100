"""A narrower stream: which of its dimensions stay, and what reads it and ends it then.

A norm behind every sublayer weighs dimensions one by one, so no rotation passes it; what can leave
are dimensions themselves. They are chosen by Optimal Brain Surgeon over everything that reads the
stream at once. What stays is asked to be what it was; every reader takes, as linear functions of
it, what it would have read: x ~ M x' + m, and W x + b becomes (W M) x' + (W m + b). Heads leave
with it, because these classes compute head_dim as hidden_size / heads.

Shapes: T tokens, D width of the stream, K after, O outputs of a reader, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder, layers_of
from dotexport.encoders.kinds import Kind
from dotexport.encoders.linear import (
    given_bias,
    linear_of,
    put,
    split,
    sums_of,
    watched,
    with_bias,
    with_one,
)
from dotexport.encoders.pooling import Pooling, pools
from dotexport.encoders.sentences import Batch
from dotexport.merging import obs
from dotexport.merging.neurons import choose, importance
from dotexport.merging.obs import Problem, Removal
from dotexport.merging.refit import Moments, fit

DAMPING = 1e-6  # of the mean diagonal
COUNTS, WIDTHS = ("num_attention_heads", "num_heads", "n_heads"), ("all_head_size", "dim")
"""How attention modules of several releases name their heads, and the width of them all."""
LAST = ""
"""In the place of a reader: what leaves the last layer."""
ANSWERS = ("classifier", "qa_outputs", "out_proj")
"""How the last layer of a head is named."""


def why_it_stays(encoder: Encoder) -> str:
    """Why the width of its stream cannot change; "" where it can."""
    if encoder.kind.wide:
        return encoder.kind.wide
    if type(encoder.model).__name__.endswith("ForMaskedLM"):
        return "what it says of masked words is read off by the table of embeddings"
    if encoder.model is encoder.base and not pools(encoder):
        return (
            "whoever reads its token vectors expects as many values; a folder of sentence-"
            "transformers has a place for the map back to them"
        )
    return ""


def head_dim(encoder: Encoder) -> int:
    """The width of a head, which stays."""
    heads = int(getattr(encoder.model.config, encoder.kind.heads))
    return encoder.hidden_size // heads


@torch.no_grad()
def leaving(encoder: Encoder, some: Sequence[Batch], least: int) -> Removal:
    """In which order dimensions of the stream leave until `least` are left."""
    width, places = encoder.hidden_size, _readers(encoder)
    places[LAST] = torch.eye(width, dtype=torch.float64)
    sums = {place: Moments.zeros(width + 1, 1) for place in places}
    for batch in (batch for batch in some if not batch.held):
        with watched(encoder.base, places.keys() - {LAST}) as seen:
            last_NLD = encoder.base(**batch.inputs).last_hidden_state
        read = {place: x_NLD for place, (x_NLD, _) in seen.items()} | {LAST: last_NLD}
        for place, x_NLD in read.items():
            x_TD = x_NLD[batch.mask]
            sums[place].add(with_one(x_TD, biased=True), x_TD.new_zeros(len(x_TD), 1))
    each_D1 = torch.arange(width)[:, None]
    problems = []
    for place, read_OD in places.items():
        hessian_DD = sums[place].given_last().inputs.full() / sums[place].count
        hessian_DD.diagonal().add_(DAMPING * float(hessian_DD.diagonal().mean()))
        said = max(float(((read_OD @ hessian_DD) * read_OD).sum()), 1e-30)  # places count alike
        problems.append(Problem(read_OD / said**0.5, hessian_DD, each_D1))
    return obs.greedy(problems, width - least)


def _readers(encoder: Encoder) -> dict[str, Tensor]:
    """A module below the base that reads the stream -> what is read with there, (O, D)."""
    kind, found = encoder.kind, {}
    for number, layer in enumerate(encoder.layers):
        for names in (attention_readers(layer, kind), [kind.reader]):
            weights = [linear_of(layer, name).weight.detach() for name in names]
            found[f"{kind.stack}.{number}.{names[0]}"] = torch.cat(weights).double()
    return found


def attention_readers(layer: nn.Module, kind: Kind) -> list[str]:
    """What queries, keys and values are read with."""
    known = (kind.attention, kind.reader, kind.writer)
    found = (name for name, part in layer.named_modules() if isinstance(part, nn.Linear))
    return [name for name in found if name not in known]


def select(model: nn.Module, kind: Kind, kept_K: Tensor) -> None:
    """Leave the other dimensions out of the base model, and repair nothing."""
    base: Any = model.base_model
    stack = layers_of(model, kind)
    inside = set(stack.modules())
    for part in base.modules():
        if isinstance(part, nn.LayerNorm):
            _norm_of(part, kept_K)
        elif isinstance(part, nn.Embedding) and part not in inside:  # there of distances
            part.weight = nn.Parameter(part.weight.detach()[:, kept_K].clone())
            part.embedding_dim = len(kept_K)
        elif isinstance(part, nn.Linear) and part not in inside:  # a pooler
            put(part, part.weight.detach()[:, kept_K], _bias(part))
    for layer in stack:
        for name in (*attention_readers(layer, kind), kind.reader):
            one = linear_of(layer, name)
            put(one, one.weight.detach()[:, kept_K], _bias(one))
        for name in (kind.attention, kind.writer):
            one = linear_of(layer, name)
            bias_D = _bias(one)
            put(one, one.weight.detach()[kept_K], None if bias_D is None else bias_D[kept_K])


def _bias(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _norm_of(norm: nn.LayerNorm, kept_K: Tensor) -> None:
    norm.normalized_shape = (len(kept_K),)
    norm.weight = nn.Parameter(norm.weight.detach()[kept_K].clone())
    if norm.bias is not None:
        norm.bias = nn.Parameter(norm.bias.detach()[kept_K].clone())


@dataclass(frozen=True)
class Lift:
    """The stream of the original as a function of the narrowed one, x = M x' + m.

    Attributes:
        error: of held-out tokens, relative to the energy of x.
    """

    map_DK: Tensor
    shift_D: Tensor | None
    error: float

    @classmethod
    def between(
        cls,
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
        held: Sequence[bool],
        kept_K: Tensor,
        *,
        biased: bool,
        known: Lift | None = None,
    ) -> Lift:
        """By least squares; the ridge pulls to leaving out what left.

        Args:
            ours, theirs: what is read of every batch, (T, K) and (T, D).
            biased: readers have a place for m.
            known: what the ridge pulls to instead.
        """
        width = theirs[0].shape[1]
        sums = sums_of(len(kept_K), width, biased=biased)
        for ours_TK, theirs_TD, is_held in zip(ours, theirs, held, strict=True):
            sums[is_held].add(with_one(ours_TK, biased=biased), theirs_TD)
        prior_DK = torch.zeros(width, len(kept_K) + biased, dtype=torch.float64)
        prior_DK[kept_K, torch.arange(len(kept_K))] = 1.0
        if known is not None and known.shift_D is not None:
            prior_DK = torch.cat([known.map_DK, known.shift_D[:, None]], dim=1)
        found = fit(*sums, prior_DK)
        weights = found.weights_OI
        return cls(
            weights[:, :-1] if biased else weights, weights[:, -1] if biased else None, found.error
        )

    def through(self, reader: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what reads x' in the place of this reader of x."""
        weight_OD = reader.weight.detach().double()
        bias_O = _bias(reader)
        if bias_O is not None and self.shift_D is not None:
            bias_O = (bias_O.double() + weight_OD @ self.shift_D).float()
        return (weight_OD @ self.map_DK).float(), bias_O


def follow(norm: nn.LayerNorm, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Scale and shift of a norm such that it says, dimension by dimension, what it is to say.

    Args:
        pairs: what it reads and what it is to say, (T, K) each.
    """
    count, sums = 0, torch.zeros(4, len(norm.weight), dtype=torch.float64)
    for read_TK, wanted_TK in pairs:
        unit_TK = nn.functional.layer_norm(read_TK, read_TK.shape[-1:], eps=norm.eps).double()
        wanted_TK = wanted_TK.double()
        parts = (unit_TK, wanted_TK, unit_TK * wanted_TK, unit_TK.square())
        sums += torch.stack([part.sum(0) for part in parts])
        count += len(unit_TK)
    unit_K, wanted_K, both_K, square_K = sums / count
    if norm.bias is None:
        scale_K = both_K / square_K.clamp_min(1e-12)
    else:
        scale_K = (both_K - unit_K * wanted_K) / (square_K - unit_K.square()).clamp_min(1e-12)
        norm.bias.copy_(wanted_K - scale_K * unit_K)
    norm.weight.copy_(scale_K)


def choose_heads(method: str, moments: Moments, writer: nn.Linear, size: int, count: int) -> Tensor:
    """Inputs of the attention's writer that stay, those of `count` heads, ascending."""
    columns_HS = torch.arange(writer.in_features).view(-1, size)
    seen_by = given_bias(moments, writer)
    weight_KD = writer.weight.detach()
    if method == "select":
        power_H = importance(seen_by, weight_KD).square()[columns_HS].sum(1)
        heads = power_H.argsort(descending=True, stable=True)[:count].sort().values
    else:
        leave = len(columns_HS) - count
        removal = obs.greedy_inputs(seen_by, weight_KD, columns_HS, leave, damping=1e-9)
        heads = removal.kept(len(columns_HS), count)
    return columns_HS[heads].flatten()


def leave_heads_out(layer: nn.Module, kind: Kind, kept_K: Tensor, count: int) -> None:
    """Of what the attention reads with, these rows stay; it is told how many heads it has.

    Args:
        kept_K: of each of queries, keys and values.
    """
    for name in attention_readers(layer, kind):
        reader = linear_of(layer, name)
        width = linear_of(layer, kind.attention).in_features
        rows = torch.cat([start + kept_K for start in range(0, reader.out_features, width)])
        bias_O = _bias(reader)
        put(reader, reader.weight.detach()[rows], None if bias_O is None else bias_O[rows])
    for part in layer.modules():
        told = dict.fromkeys(COUNTS, count) | {word: len(kept_K) for word in WIDTHS}
        for word in told.keys() & vars(part).keys():
            setattr(part, word, told[word])


@dataclass(frozen=True)
class Last:
    """What last layers say of every batch, (N, L, K) and (N, L, D), and dimensions that stayed."""

    some: Sequence[Batch]
    ours: list[Tensor]
    theirs: list[Tensor]
    kept_K: Tensor

    @classmethod
    def of(cls, encoder: Encoder, model: nn.Module, some: Sequence[Batch], kept_K: Tensor) -> Last:
        bases: tuple[Any, Any] = (model.base_model, encoder.base)
        ours, theirs = ([base(**x.inputs).last_hidden_state for x in some] for base in bases)
        return cls(some, ours, theirs, kept_K)

    def lift(self, *, biased: bool) -> Lift:
        """From one to the other, of all tokens."""
        masks = [batch.mask for batch in self.some]
        ours, theirs = (
            [said[mask] for said, mask in zip(side, masks, strict=True)]
            for side in (self.ours, self.theirs)
        )
        return Lift.between(ours, theirs, self._held, self.kept_K, biased=biased)

    def back(self, pooling: Pooling) -> nn.Linear:
        """The same as a module, of what is pooled: what tokens say on average is what counts."""
        ours, theirs = (
            [pooling.pooled(said, x.mask) for said, x in zip(side, self.some, strict=True)]
            for side in (self.ours, self.theirs)
        )
        known = self.lift(biased=True)
        lift = Lift.between(ours, theirs, self._held, self.kept_K, biased=True, known=known)
        assert lift.shift_D is not None
        module = nn.Linear(len(self.kept_K), len(lift.map_DK))
        put(module, lift.map_DK.float(), lift.shift_D.float())
        return module

    @property
    def _held(self) -> list[bool]:
        return [batch.held for batch in self.some]


def end(encoder: Encoder, model: nn.Module, last: Last, method: str) -> None:
    """What reads the last layer: a head's dense layer gets as many outputs as the stream, and what
    answers is fitted to the original's answers."""
    head, kept_K = _Head.of(encoder), last.kept_K
    rows = head.rows(encoder, last.some, len(kept_K), method) if head.answer else kept_K
    if head.dense:
        weight_DK, bias_D = _through(last, linear_of(encoder.model, head.dense))
        put(linear_of(model, head.dense), weight_DK[rows], None if bias_D is None else bias_D[rows])
    if head.norm:
        _norm_of(model.get_submodule(head.norm), rows)  # type: ignore[arg-type]
    if not head.answer:
        return
    known, ours = linear_of(encoder.model, head.answer), linear_of(model, head.answer)
    if head.dense:
        put(ours, known.weight.detach()[:, rows], _bias(known))
    else:
        put(ours, *_through(last, known))
    if method != "select":
        sums = _read((model, head.answer), (encoder.model, head.answer), last.some)
        put(ours, *split(ours, fit(*sums, with_bias(ours)).weights_OI))


def _through(last: Last, reader: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return last.lift(biased=reader.bias is not None).through(reader)


@dataclass(frozen=True)
class _Head:
    """Names of what stands behind the last layer, "" of what does not.

    Attributes:
        dense, norm: as wide as the stream, with an activation between them.
        answer: says what is asked for.
    """

    dense: str
    norm: str
    answer: str

    @classmethod
    def of(cls, encoder: Encoder) -> _Head:
        base: Any = encoder.base
        inside = {*encoder.layers.modules(), *base.embeddings.modules()}
        parts = [pair for pair in encoder.model.named_modules() if pair[1] not in inside]
        linear = [name for name, part in parts if isinstance(part, nn.Linear)]
        answer = next((name for name in linear if name.split(".")[-1] in ANSWERS), "")
        dense = next((name for name in linear if name != answer), "")
        beside = f"{dense.rpartition('.')[0]}."
        norms = [name for name, part in parts if isinstance(part, nn.LayerNorm)]
        norm = next((name for name in norms if dense and name.startswith(beside)), "")
        return cls(dense, norm, answer)

    def rows(self, encoder: Encoder, some: Sequence[Batch], count: int, method: str) -> Tensor:
        """Outputs of the dense layer that stay: by what its activation says to what answers; a norm
        between them weighs it, and adds up to nothing, from which any output would follow."""
        if not self.dense:
            return torch.arange(count)
        model, before = encoder.model, self.norm or self.answer
        train, _ = _read((model, before), (model, self.answer), some)
        answer = linear_of(model, self.answer)
        weight_OD = answer.weight.detach()
        if self.norm:
            weight_OD = weight_OD * model.get_submodule(self.norm).weight  # type: ignore[operator]
        return choose(method, given_bias(train, answer), weight_OD, count)


def _read(
    ours: tuple[nn.Module, str], theirs: tuple[nn.Module, str], some: Sequence[Batch]
) -> tuple[Moments, Moments]:
    """Of what one module reads, and what another says.

    Args:
        ours, theirs: models and names.
    """
    (model, reader), (original, answer) = ours, theirs
    known, sums = linear_of(original, answer), None
    biased = known.bias is not None
    for batch in some:
        with watched(model, {reader}) as seen:
            model(**batch.inputs)
        with watched(original, {answer}) as told:
            original(**batch.inputs)
        read, said = seen[reader][0], told[answer][1]
        if read.ndim == 3:  # of every token
            read, said = read[batch.mask], said[batch.mask]
        sums = sums or sums_of(read.shape[-1], known.out_features, biased=biased)
        sums[batch.held].add(with_one(read, biased=biased), said)
    assert sums is not None
    return sums


def rebuilt(encoder: Encoder, model: nn.Module, hidden_size: int, width: int) -> nn.Module:
    """The same weights in the stock class of these sizes."""
    settings: Any = copy.deepcopy(model.config)
    heads = hidden_size // head_dim(encoder)
    words = {encoder.kind.stream: hidden_size, encoder.kind.heads: heads}
    for word, value in {**words, encoder.kind.width: width}.items():
        setattr(settings, word, value)
    made: nn.Module = type(model)(settings).eval()
    made.load_state_dict(model.state_dict())
    return made
