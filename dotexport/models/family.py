"""What a family table is made of: which axes of which tensors are the same neurons.

Spaces, and the number of neurons in each (all from config.json):

    residual  hidden_size                          what every norm reads and every writer adds to
    mlp       intermediate_size                    between gate/up and down
    query     num_attention_heads * head_dim       between q and o
    heads     num_attention_heads                  what there is one of for each query head
    gated_query  twice as many as query            a query and the gate of its head, head by head
    kv        num_key_value_heads * head_dim       k and v
    head_dim                                       of one head
    experts   num_experts                          rows of a router
    expert    moe_intermediate_size                between gate/up and down of one expert
    vocab     vocab_size

A family may have spaces of its own (`Family.spaces`): a multiple of a size that an axis cuts is cut
with it, others by no axis. Parameter counts, width
checks, legal sizes and the narrowing itself follow from the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dotexport.errors import UsageError
from dotexport.models.stacks import Stack

ALWAYS = "always"
"""In the place of a flag: a bias that the class has without asking config.json."""

KEYS = ("kv", "global_kv")
"""Spaces of keys and values; a family whose heads have two widths calls the second one so."""

EACH = "{}"
"""In the name of a Linear: the number of an expert. There is one for each of them."""

HEADS = "heads"
"""The space of a number for each query head, which leaves with its features in `query`."""


@dataclass(frozen=True)
class Linear:
    """A torch.nn.Linear: weight (out, in).

    Attributes:
        name: as in the files; with EACH in it, of one expert, even where files keep all of them
            in one tensor (`Family.stacks`).
        out: the space of its rows; of several matrices fused into one, their spaces in that order
            (`query+kv+kv`).
        bias: the config flag that gives it one, or ALWAYS.
    """

    name: str
    out: str
    in_: str
    bias: str | None = None

    @cached_property
    def outs(self) -> tuple[str, ...]:
        return tuple(self.out.split("+"))

    @property
    def each(self) -> bool:
        """Whether every expert has one."""
        return EACH in self.name

    def names(self, num_experts: int) -> list[str]:
        """Of all that there are in a layer."""
        return [self.name.format(n) for n in range(num_experts)] if self.each else [self.name]


@dataclass(frozen=True)
class InnerNorm:
    """An RMSNorm of what a reader gives.

    Attributes:
        reader: name of that linear.
        per_head: over the features of each head, which no narrowing touches; else over all of
            them, whose number and mean change with the heads.
        head: the space of the features of a head.
        weighted: whether it has a gamma.
    """

    name: str
    reader: str
    per_head: bool = True
    head: str = "head_dim"
    weighted: bool = True


@dataclass(frozen=True)
class Untouched:
    """A parameter inside a sublayer that no narrowing changes: its rows stay, or leave with what
    the writer reads, or with the query heads whose they are.

    Attributes:
        shape: of each of its axes the space, or the number where that is no size.
    """

    name: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class Shared:
    """An expert that all tokens go to, beside those that a router chooses.

    Attributes:
        inner: its gate and its up, or one matrix with the rows of the one and then of the other.
        weight: of one row: what it gives counts by the sigmoid of it. None: it counts whole.
    """

    inner: tuple[Linear, ...]
    writer: Linear
    weight: Linear | None = None

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (*self.inner, *([self.weight] if self.weight else ()))


@dataclass(frozen=True)
class Sublayer:
    """Norm, readers of the normalised stream, and one writer that adds back to it.

    Of a mixture, one reader is the router; all others and the writer are those of each expert, and
    beside them there may be a shared one with its own.

    Attributes:
        norm: in front of the readers; None: they read the stream as it is.
        inner_norms: of queries and keys, or of values.
        output_norm: of what the writer gives, before it is added to the stream.
        untouched: what else lies between readers and writer.
        given: whether what its module gives is multiplied with an input of the layer's own
            (`Family.per_layer`).
        shared: of a mixture.
        scaled_by: a number that the stream behind it is multiplied with; a buffer, which stays.
    """

    module: str
    norm: str | None
    readers: tuple[Linear, ...]
    writer: Linear
    inner_norms: tuple[InnerNorm, ...] = ()
    output_norm: str | None = None
    untouched: tuple[Untouched, ...] = ()
    given: bool = False
    scaled_by: str | None = None
    shared: Shared | None = None

    @cached_property
    def all_readers(self) -> tuple[Linear, ...]:
        """Those of a shared expert among them."""
        return (*self.readers, *(self.shared.readers if self.shared else ()))

    @cached_property
    def writers(self) -> tuple[Linear, ...]:
        """That of a shared expert among them."""
        return (self.writer, *([self.shared.writer] if self.shared else ()))

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All readers, then all writers."""
        return (*self.all_readers, *self.writers)

    @property
    def keys(self) -> str | None:
        """The space of its keys and of its values, where it has its own."""
        spaces = [space for linear in self.readers for space in linear.outs]
        return next((space for space in KEYS if space in spaces), None)

    @property
    def router(self) -> Linear | None:
        """The reader whose outputs say which experts a token goes to."""
        return next((linear for linear in self.readers if linear.out == "experts"), None)

    def gain(self, scale: float) -> float:
        """What all readers are multiplied with, where a narrower norm asks for `scale`."""
        return 1.0 if self.norm is None else scale

    def inner_gain(self, linear: Linear, scale: float) -> float:
        """What one reader is multiplied with besides: a norm behind it has the same epsilon, times
        scale^2, and then gives the same."""
        return scale if any(norm.reader == linear.name for norm in self.inner_norms) else 1.0


@dataclass(frozen=True)
class PerLayer:
    """An input of each layer's own: of every token a row of a table for all layers, and a norm of
    what a projection makes of its embedding.

    Attributes:
        table: a row for each token, as the embedding has one; it loses the same rows.
        rows_key: what config.json calls their number.
        projection: of the embedding, for all layers behind one another.
        norm: of the projection's part for a layer.
        features: the space of the input of one layer.
    """

    table: str
    rows_key: str
    projection: Linear
    norm: str
    features: str

    @property
    def unchanged(self) -> tuple[str, str]:
        """Tensors that no narrowing touches."""
        return f"{self.table}.weight", f"{self.norm}.weight"


@dataclass(frozen=True)
class Family:
    """One stock class of transformers.

    Attributes:
        sublayers: of a layer, in their order; where layers differ, all that any layer has.
        kinds: an entry of `layer_types`, or what `kinds_of` says -> the sublayers of such a layer;
            empty: all layers have all.
        kinds_of: config of the class -> the kind of each layer, where more than `layer_types`
            decides that.
        epsilon_stays: whether a norm lies inside a sublayer, behind no reader that could be scaled
            for another epsilon, or runtimes pass over what config.json says of it: then the
            narrower stream is scaled (models/exact_norm.py).
        release: of transformers, the first that has the class, with a cache as others keep it.
        epsilon_key: what config.json calls the epsilon of every norm.
        left_out: how names of tensors and of words in config.json begin that the class passes over:
            heads for further tokens, which files hold besides.
        unread: config.json -> how names of tensors begin, as the class has them, that it passes
            over for what this one says.
        spaces: its own ones, and the keys of config.json (or numbers) whose product is their number
            of neurons.
        stays: axis -> why nothing of it can leave, said of a smaller size.
        per_layer: what layers are given besides the stream.
        gated: the MLP's reader whose nonlinearity forbids a free sign or scale; where it is fused
            with another, its rows are the first. None: matrices come apart before they are cut.
        divides: whether the class insists on hidden_size % num_attention_heads == 0.
        windows: whether layers of it can attend to a window (`sliding_window`) only.
        carriers: architectures that compute the same and that more runtimes read, the best first;
            what is written is the first that holds the sizes (models/carriers.py). Empty: itself.
        head_dim: of a head, where config.json does not say; None: hidden_size / heads.
        num_key_value_heads: where config.json does not say; None: as many as heads.
        tied_by_default: what tie_word_embeddings is where config.json does not say.
        unit_offset: whether its norms multiply by 1 + weight.
        rope_theta: base of its rotary embedding, where config.json does not say and readers that
            do not know the class take another.
        scaled_embedding: whether rows of the embedding are multiplied by sqrt(hidden_size).
        refused: flags of config.json that make another model of it, and what they do.
        newer_kinds: what some releases of transformers say in `layer_types` -> what all read, which
            is what is written.
        mlp_key: what config.json calls the width of the MLP; where that is not intermediate_size,
            both are written.
        experts_key: what config.json calls the number of experts, where the class is a mixture.
        stacks: tensors in which its files keep experts together; empty: they keep them apart.
        clamped: alpha and limit of the gate of an expert that is clamped (models/gating.py), where
            config.json does not say. None: the nonlinearity that config.json names.
        as_built: config.json -> the same in words that say what the class makes of it, where this
            class alone makes something else of words that others have too; raises what refuses it.
        mixture: the table of the same class where config.json says that there are experts.
    """

    model_type: str
    architecture: str
    embedding: str
    layer: str
    sublayers: tuple[Sublayer, ...]
    final_norm: str
    head: Linear
    gated: str | None
    divides: bool
    windows: bool = False
    carriers: tuple[str, ...] = ()
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    tied_by_default: bool = False
    unit_offset: bool = False
    rope_theta: float | None = None
    scaled_embedding: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    experts_key: str | None = None
    stacks: tuple[Stack, ...] = ()
    clamped: tuple[float, float] | None = None
    kinds: tuple[tuple[str, tuple[Sublayer, ...]], ...] = ()
    kinds_of: Callable[[Any], Sequence[str]] | None = None
    spaces: tuple[tuple[str, tuple[str | int, ...]], ...] = ()
    stays: tuple[tuple[str, str], ...] = ()
    per_layer: PerLayer | None = None
    epsilon_stays: bool = False
    release: int = 4
    epsilon_key: str = "rms_norm_eps"
    left_out: tuple[str, ...] = ()
    unread: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    newer_kinds: tuple[tuple[str, str], ...] = ()
    mlp_key: str = "intermediate_size"
    as_built: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    mixture: Family | None = None

    def in_layer(self, kind: str) -> tuple[Sublayer, ...]:
        """The sublayers of a layer of this kind."""
        return dict(self.kinds)[kind] if self.kinds else self.sublayers

    def attends(self, kind: str) -> bool:
        """Whether such a layer has keys of its own."""
        return any(part.keys is not None for part in self.in_layer(kind))

    def kind(self, said: str) -> str:
        """An entry of `layer_types` in the words that are written."""
        return dict(self.newer_kinds).get(said, said)

    def kinds_in(self, stock: Any) -> list[str]:
        """Of each layer, by the class's config; where all are alike, none."""
        if not self.kinds:
            return []
        return list(self.kinds_of(stock) if self.kinds_of else map(self.kind, stock.layer_types))

    @property
    def row_keys(self) -> tuple[str, ...]:
        """What config.json calls the number of tokens."""
        return "vocab_size", *([self.per_layer.rows_key] if self.per_layer else ())

    @property
    def row_tables(self) -> tuple[str, ...]:
        """Tensors with a row for each token."""
        further = [self.per_layer.table] if self.per_layer else []
        return tuple(f"{name}.weight" for name in (self.embedding, self.head.name, *further))

    @property
    def rotates(self) -> bool:
        """Whether any basis of the residual stream gives the same model: not where what is added
        to it is normalised axis by axis."""
        return all(sublayer.output_norm is None for sublayer in self.sublayers)

    def uncarried(self) -> Family:
        """The same, written as no other class than its own.

        Raises:
            UsageError: matrices of it are fused, and are narrowed apart.
        """
        own = {space for space, _ in self.spaces}
        if self.carriers and any(len({*linear.outs} - own) > 1 for linear in self.linears):
            carriers = " or ".join(self.carriers)
            raise UsageError(
                f"--keep-class: {self.architecture} fuses matrices that are narrowed apart, and is "
                f"written as {carriers}; leave the flag out"
            )
        return replace(self, carriers=())

    def stream_gain(self, scale: float) -> float:
        """What the narrower stream is multiplied with, where readers are with `scale`."""
        return 1 / scale if self.epsilon_stays else 1.0

    def inner_scale(self, scale: float) -> float:
        """What readers in front of an inner norm are multiplied with besides."""
        return 1.0 if self.epsilon_stays else scale

    def embedding_scale(self, hidden_size: int) -> float:
        """What rows of the embedding are multiplied with on their way into the stream."""
        return math.sqrt(hidden_size) if self.scaled_embedding else 1.0

    @property
    def bias_flags(self) -> frozenset[str]:
        """Flags of config.json that give linears of the class biases."""
        return frozenset(linear.bias for linear in self.linears if linear.bias) - {ALWAYS}

    @property
    def linears(self) -> list[Linear]:
        """Those of one layer, or of any: readers, then writers, sublayer by sublayer."""
        return _linears(self.sublayers)

    def linears_in(self, kind: str) -> list[Linear]:
        """Those of one layer of this kind."""
        return _linears(self.in_layer(kind))

    def layer_name(self, layer: int, part: str) -> str:
        return f"{self.layer.format(layer)}.{part}"


def _linears(sublayers: Iterable[Sublayer]) -> list[Linear]:
    return [linear for sub in sublayers for linear in sub.linears]
