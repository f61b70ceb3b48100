"""The numbers of config.json that decide every shape, and the shapes that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import SimpleNamespace
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.family import ALWAYS, HEADS, Family, Linear, Sublayer
from dotexport.models.rope import stock_config
from dotexport.models.stacks import Slot

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json that say how many experts there are; some classes have one of theirs."""

# Keys of config.json that an axis cuts -> their name in `Sizes`: what is a multiple of one follows.
FOLLOWED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_hidden_layers": "num_layers",
}
AS_WIDE = ("hidden_size", 1)
MOST_NEURONS = 1 << 24
MOST = {"num_layers": 10_000}


@dataclass(frozen=True)
class Sizes:
    """The numbers of config.json that decide every shape, and what a carrier must hold besides.

    What no matrix of a family has is 0.

    Attributes:
        biases: flags that are on.
        windowed: some layers, unlike others, attend to a window only.
        num_experts, num_experts_per_tok: of each layer, and of those the ones a token goes to; 0
            where there are none.
        moe_intermediate_size: of an expert, where that has a number of its own.
        kinds: of each layer, where they differ; as many as layers, or those of the original while
            it is not known which of them stay.
        fixed: space of the family's own -> number of neurons.
        following: of others of its own the size that they are a multiple of, and how often they
            hold it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    tied: bool
    biases: frozenset[str] = frozenset()
    windowed: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    kinds: tuple[str, ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()
    following: tuple[tuple[str, str, int], ...] = ()

    @property
    def as_wide(self) -> list[str]:
        """Spaces of the family's own that are as wide as the stream."""
        return [space for space, size, times in self.following if (size, times) == AS_WIDE]

    def kind(self, layer: int) -> str:
        """Of one layer; where all are alike, none."""
        return self.kinds[layer] if self.kinds else ""

    @property
    def each_kind(self) -> list[str]:
        """Once; where all are alike, none."""
        return list(dict.fromkeys(self.kinds)) or [""]

    def of_layers(self, kept: Sequence[int]) -> Sizes:
        """The same once it is known which of the original's layers stay."""
        if not self.kinds or len(self.kinds) == self.num_layers:
            return self
        return replace(self, kinds=tuple(self.kinds[layer] for layer in kept))

    def layers_with(self, family: Family, sublayer: Sublayer) -> float:
        """How many layers have it; while it is not known which stay, as large a share of them as
        of the original's."""
        if not self.kinds:
            return self.num_layers
        having = sum(sublayer in family.in_layer(kind) for kind in self.kinds)
        return having * self.num_layers / len(self.kinds)

    def has_bias(self, linear: Linear) -> bool:
        return linear.bias == ALWAYS or linear.bias in self.biases

    def rows(self, linear: Linear) -> list[int]:
        """Outputs of a linear, one number for each matrix that is fused into it."""
        return [self.spaces[space] for space in linear.outs]

    def copies(self, linear: Linear) -> int:
        """How many there are of it in a layer."""
        return self.num_experts if linear.each else 1

    @property
    def mixture(self) -> bool:
        return self.num_experts > 0

    @property
    def fitted(self) -> float:
        """Neurons that an MLP's writer is fitted on, over the share of the tokens that it sees."""
        neurons = max(self.spaces["mlp"], self.spaces["expert"])
        return neurons * (self.num_experts / self.num_experts_per_tok if self.mixture else 1.0)

    def used(self, linear: Linear) -> int:
        """How many of these a token is multiplied with."""
        return self.num_experts_per_tok if linear.each else 1

    @cached_property
    def spaces(self) -> dict[str, int]:
        """Space -> number of neurons."""
        return {
            "residual": self.hidden_size,
            "mlp": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            HEADS: self.num_attention_heads,
            "gated_query": 2 * self.num_attention_heads * self.head_dim,
            "kv": self.num_key_value_heads * self.head_dim,
            "experts": self.num_experts,
            "expert": self.moe_intermediate_size,
            "vocab": self.vocab_size,
            "head_dim": self.head_dim,
            **dict(self.fixed),
            **{space: times * getattr(self, size) for space, size, times in self.following},
        }

    def extent(self, axis: str | int) -> int:
        """Of one axis of a tensor: spaces behind one another, or a number."""
        if isinstance(axis, int):
            return axis
        return sum(self.spaces[space] for space in axis.split("+"))


def shapes(family: Family, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model, by name, in the order in which narrowing makes them."""
    width = sizes.spaces
    yield f"{family.embedding}.weight", (sizes.vocab_size, sizes.hidden_size)
    if given := family.per_layer:
        table, gamma = given.unchanged
        features = width[given.projection.out]
        yield table, (sizes.vocab_size, features)
        yield f"{given.projection.name}.weight", (features, width[given.projection.in_])
        yield gamma, (width[given.features],)
    for layer in range(sizes.num_layers):
        for sublayer in family.in_layer(sizes.kind(layer)):
            for outer in filter(None, (sublayer.norm, sublayer.output_norm)):
                yield family.layer_name(layer, f"{outer}.weight"), (sizes.hidden_size,)
            widths = {linear.name: sum(sizes.rows(linear)) for linear in sublayer.readers}
            for norm in sublayer.inner_norms:
                features = width[norm.head] if norm.per_head else widths[norm.reader]
                if norm.weighted:
                    yield family.layer_name(layer, f"{norm.name}.weight"), (features,)
            for other in sublayer.untouched:
                extents = tuple(sizes.extent(axis) for axis in other.shape)
                yield family.layer_name(layer, other.name), extents
            for linear in sublayer.linears:
                rows = sum(sizes.rows(linear))
                for one in linear.names(sizes.num_experts):
                    name = family.layer_name(layer, one)
                    yield f"{name}.weight", (rows, width[linear.in_])
                    if sizes.has_bias(linear):
                        yield f"{name}.bias", (rows,)
            if sublayer.scaled_by:
                yield family.layer_name(layer, sublayer.scaled_by), (1,)
    yield f"{family.final_norm}.weight", (sizes.hidden_size,)
    if not sizes.tied:
        yield f"{family.head.name}.weight", (sizes.vocab_size, sizes.hidden_size)


def slots(family: Family, sizes: Sizes) -> dict[str, Slot]:
    """Tensor of an expert -> where it lies in files that keep experts together."""
    return {
        family.layer_name(layer, part.format(expert)): Slot(
            family.layer_name(layer, stack.name), stack, sizes.num_experts, expert, place
        )
        for layer in range(sizes.num_layers)
        for stack in family.stacks
        for expert in range(sizes.num_experts)
        for place, part in enumerate(stack.parts)
    }


def num_parameters(family: Family, sizes: Sizes) -> int:
    """Distinct weights as torch counts them, which are no buffers; a tied embedding counts once. At
    most, while it is not known which layers stay."""
    layers = _over_layers(sizes, lambda kind: layer_parameters(family, sizes, kind))
    tables = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tied else 2)
    if given := family.per_layer:
        rows = sizes.spaces[given.projection.out]
        tables += rows * (sizes.vocab_size + sizes.hidden_size) + sizes.spaces[given.features]
    return tables + sizes.hidden_size + layers


def _over_layers(sizes: Sizes, count: Callable[[str], int]) -> int:
    """The sum over layers of what one of a kind counts; of as many as there may be, the largest."""
    # Kinds are few, and a search over sizes asks this thousands of times.
    if not sizes.kinds:
        return sizes.num_layers * count("")
    each = {kind: count(kind) for kind in set(sizes.kinds)}
    return sum(sorted(map(each.__getitem__, sizes.kinds), reverse=True)[: sizes.num_layers])


def layer_parameters(family: Family, sizes: Sizes, kind: str) -> int:
    """Of one layer of this kind."""
    return sum(_layer_parameters(family, sizes, kind))


def _layer_parameters(family: Family, sizes: Sizes, kind: str) -> Iterator[int]:
    """Of each tensor of a layer of this kind, as `shapes` has them."""
    width = sizes.spaces
    for sublayer in family.in_layer(kind):
        yield sizes.hidden_size * sum(n is not None for n in (sublayer.norm, sublayer.output_norm))
        rows = {linear.name: sum(sizes.rows(linear)) for linear in sublayer.linears}
        for norm in sublayer.inner_norms:
            features = width[norm.head] if norm.per_head else rows[norm.reader]
            yield features if norm.weighted else 0
        yield sum(prod(map(sizes.extent, other.shape)) for other in sublayer.untouched)
        for linear in sublayer.linears:
            each = rows[linear.name] * (width[linear.in_] + sizes.has_bias(linear))
            yield sizes.copies(linear) * each


def num_multiplications(family: Family, sizes: Sizes) -> int:
    """Of the matrices of one decoded token: every linear of every layer, and the head."""
    layers = sum(
        sizes.layers_with(family, sublayer) * products_of(sublayer, sizes)
        for sublayer in family.sublayers
    )
    once = sizes.spaces[family.per_layer.projection.out] if family.per_layer else 0
    return round(layers) + (sizes.vocab_size + once) * sizes.hidden_size


def products_of(sublayer: Sublayer, sizes: Sizes) -> int:
    """Multiplications of a token in one sublayer."""
    return sum(
        sizes.used(linear) * sum(sizes.rows(linear)) * sizes.spaces[linear.in_]
        for linear in sublayer.linears
    )


def attended(family: Family, sizes: Sizes) -> float:
    """Features of queries of one token, in all layers that look back at keys."""
    attending = (s for s in family.sublayers if s.module == "self_attn")
    return sum(sizes.layers_with(family, s) * sizes.spaces[s.writer.in_] for s in attending)


def cached_numbers(family: Family, sizes: Sizes) -> int:
    """Keys and values of one token in all layers that keep them."""
    keeping = ((s, s.keys) for s in family.sublayers)
    each = (sizes.layers_with(family, s) * sizes.spaces[keys] for s, keys in keeping if keys)
    return round(2 * sum(each))


def lent_numbers(family: Family, sizes: Sizes) -> int:
    """Keys and values of one token that later layers look at, of each kind of layer."""
    every = {sublayer for kind in sizes.each_kind for sublayer in family.in_layer(kind)}
    attending = [sublayer.keys for sublayer in every if sublayer.module == "self_attn"]
    lent = 2 * sum(sizes.spaces[keys] for keys in attending if keys)
    return lent if None in attending else 0


def read_sizes(family: Family, config: Mapping[str, Any]) -> Sizes:
    """The sizes a config.json declares; families name them differently, Optimum knows how.

    Raises:
        CheckpointError: a size is missing or not a positive integer, or heads are left over.
    """
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    try:
        normal = NormalizedConfigManager.get_normalized_config_class(family.model_type)
    except KeyError:  # it knows no names of this class, which then are the usual ones
        normal = NormalizedTextConfig
    named = normal(SimpleNamespace(**config))
    heads, hidden = _size(named, "num_attention_heads"), _size(named, "hidden_size")
    absent = "num_key_value_heads" not in config  # null means as many as heads in every class
    default = (absent and family.num_key_value_heads) or heads
    groups = _size(named, "num_key_value_heads", default=default)
    if heads % groups:
        raise CheckpointError(
            f"config.json gives {heads} query heads and, by itself or by the default of "
            f"{family.architecture}, {groups} KV heads, which do not divide them; take the "
            "config.json that belongs to these weights"
        )
    return Sizes(
        hidden_size=hidden,
        intermediate_size=_size(named, family.mlp_key) if _has(family, "mlp") else 0,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=_size(named, "head_dim", default=family.head_dim or hidden // heads),
        num_layers=_size(named, "num_layers"),
        vocab_size=_size(named, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
        biases=frozenset(flag for flag in family.bias_flags if config.get(flag)),
        windowed=_windowed(config),
        **(_experts(named, family) if family.experts_key else {}),
        **(_of_kinds(config, family) if family.kinds else {}),
    )


def _of_kinds(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What layers are, and sizes of the family's own, as the class has what is not said."""
    stock = stock_config(config)
    fixed: list[tuple[str, int]] = []
    following: list[tuple[str, str, int]] = []
    for space, keys in family.spaces:
        axis = next((key for key in keys if key in FOLLOWED), None)
        times = prod(_own_size(config, stock, key) for key in keys if key != axis)
        if axis is None:
            fixed.append((space, times))
        else:
            following.append((space, FOLLOWED[axis], times))
    kinds = _kinds(config, family, family.kinds_in(stock))
    return {"kinds": kinds, "fixed": tuple(fixed), "following": tuple(following)}


def _own_size(config: Mapping[str, Any], stock: Any, key: str | int) -> int:
    """What is said under a key, by config.json or by the class's default; or the number itself."""
    if isinstance(key, int):
        return key
    return _size(SimpleNamespace(**config) if config.get(key) is not None else stock, key)


def _kinds(config: Mapping[str, Any], family: Family, said: Sequence[str]) -> tuple[str, ...]:
    """Of each layer."""
    known = [kind for kind, _ in family.kinds]
    if len(said) != config.get("num_hidden_layers") or not set(said) <= set(known):
        raise CheckpointError(
            f"config.json gives layer_types = {said!r}; expected {' or '.join(known)} for each of "
            f"its {config.get('num_hidden_layers')} layers: take the config.json that belongs to "
            "these weights"
        )
    if not any(map(family.attends, said)):
        raise UnsupportedModelError(
            f"config.json gives layer_types of which none attends: {', '.join(sorted(set(said)))}; "
            f"{family.architecture} has no cache that decodes these alone: take a model with a "
            "layer of attention"
        )
    return tuple(said)


def _experts(named: Any, family: Family) -> dict[str, Any]:
    """What config.json says of a mixture."""
    assert family.experts_key is not None
    keys = {"num_experts": family.experts_key, "num_experts_per_tok": "num_experts_per_tok"}
    if _has(family, "expert"):
        keys["moe_intermediate_size"] = "moe_intermediate_size"
    found = {name: _size(named, key) for name, key in keys.items()}
    if found["num_experts_per_tok"] > found["num_experts"]:
        raise CheckpointError(
            f"config.json sends each token to {found['num_experts_per_tok']} of "
            f"{found['num_experts']} experts; take the config.json that belongs to these weights"
        )
    return found


def _has(family: Family, space: str) -> bool:
    """Whether any matrix of a layer has neurons of this space."""
    return any(space in (*linear.outs, linear.in_) for linear in family.linears)


def _windowed(config: Mapping[str, Any]) -> bool:
    """Whether the switch of the Qwen classes is on, and some layer behind it."""
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers", 0)
    if not config.get("use_sliding_window"):
        return False
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(layers > config.get("max_window_layers", 28))


def _size(named: Any, key: str, *, default: int | None = None) -> int:
    try:
        value = getattr(named, key)
    except AttributeError:  # absent, or null: the class has a default for it
        value = default
    if type(value) is int and value > MOST.get(key, MOST_NEURONS):
        raise CheckpointError(
            f"config.json gives {key} = {value:,}, more than {MOST.get(key, MOST_NEURONS):,}, "
            "which no model has; take the config.json that belongs to these weights"
        )
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"config.json gives {key} = {value!r}; expected a positive integer: "
            "is it the config of a decoder model?"
        )
    return value


def check_shapes(
    family: Family, sizes: Sizes, found: Mapping[str, tuple[int, ...]], folder: object
) -> None:
    """Refuse a checkpoint whose tensors are not those its config declares.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    expected = dict(shapes(family, sizes))
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(expected)} tensors its config.json calls "
            f"for, first {missing[0]}; take a complete copy of the model"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(found[name])} where config.json says {shape}; "
                "config and weights are not of the same model"
            )
