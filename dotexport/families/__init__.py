"""Model families: per family one table that says which axes of which tensors are the same neurons.

Spaces, and the number of neurons in each (all from config.json):

    residual  hidden_size                          what every norm reads and every writer adds to
    mlp       intermediate_size                    between gate/up and down
    query     num_attention_heads * head_dim       between q and o
    kv        num_key_value_heads * head_dim       k and v
    vocab     vocab_size

Parameter counts, width checks, legal sizes and the narrowing itself follow from the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError

ALWAYS = "always"
"""In the place of a flag: a bias that the class has without asking config.json."""


@dataclass(frozen=True)
class Linear:
    """A torch.nn.Linear: weight (out, in).

    Attributes:
        out: the space of its rows; of several matrices fused into one, their spaces in that order
            (`query+kv+kv`).
        bias: the config flag that gives it one, or ALWAYS.
    """

    name: str
    out: str
    in_: str
    bias: str | None = None

    @property
    def outs(self) -> tuple[str, ...]:
        return tuple(self.out.split("+"))


@dataclass(frozen=True)
class InnerNorm:
    """An RMSNorm of what a reader gives.

    Attributes:
        reader: name of that linear.
        per_head: over the features of each head, which no narrowing touches; else over all of
            them, whose number and mean change with the heads.
    """

    name: str
    reader: str
    per_head: bool = True


@dataclass(frozen=True)
class Sublayer:
    """Norm, readers of the normalised stream, and one writer that adds back to it.

    Attributes:
        norm: in front of the readers; None: they read the stream as it is.
        inner_norms: of queries and keys.
        output_norm: of what the writer gives, before it is added to the stream.
    """

    module: str
    norm: str | None
    readers: tuple[Linear, ...]
    writer: Linear
    inner_norms: tuple[InnerNorm, ...] = ()
    output_norm: str | None = None

    def gain(self, scale: float) -> float:
        """What all readers are multiplied with, where a narrower norm asks for `scale`."""
        return 1.0 if self.norm is None else scale

    def inner_gain(self, linear: Linear, scale: float) -> float:
        """What one reader is multiplied with besides: a norm behind it has the same epsilon, times
        scale^2, and then gives the same."""
        return scale if any(norm.reader == linear.name for norm in self.inner_norms) else 1.0


@dataclass(frozen=True)
class Family:
    """One stock class of transformers.

    Attributes:
        gated: the MLP's reader whose nonlinearity forbids a free sign or scale; None where it is
            fused with another.
        divides: whether the class insists on hidden_size % num_attention_heads == 0.
        windows: whether layers of it can attend to a window (`sliding_window`) only.
        carriers: architectures that compute the same and that more runtimes read, the best first;
            what is written is the first that holds the sizes (carriers.py). Empty: itself.
        head_dim: of a head, where config.json does not say; None: hidden_size / heads.
        tied_by_default: what tie_word_embeddings is where config.json does not say.
        unit_offset: whether its norms multiply by 1 + weight.
        scaled_embedding: whether rows of the embedding are multiplied by sqrt(hidden_size).
        refused: flags of config.json that make another model of it, and what they do.
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
    tied_by_default: bool = False
    unit_offset: bool = False
    scaled_embedding: bool = False
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def rotates(self) -> bool:
        """Whether any basis of the residual stream gives the same model: not where what is added
        to it is normalised axis by axis."""
        return all(sublayer.output_norm is None for sublayer in self.sublayers)

    def embedding_scale(self, hidden_size: int) -> float:
        """What rows of the embedding are multiplied with on their way into the stream."""
        return math.sqrt(hidden_size) if self.scaled_embedding else 1.0

    @property
    def bias_flags(self) -> frozenset[str]:
        """Flags of config.json that give linears of the class biases."""
        return frozenset(linear.bias for linear in self.linears if linear.bias) - {ALWAYS}

    @property
    def linears(self) -> list[Linear]:
        """Those of one layer: readers, then the writer, sublayer by sublayer."""
        return [linear for sub in self.sublayers for linear in (*sub.readers, sub.writer)]

    def layer_name(self, layer: int, part: str) -> str:
        return f"{self.layer.format(layer)}.{part}"


@dataclass(frozen=True)
class Sizes:
    """The numbers of config.json that decide every shape, and what a carrier must hold besides.

    Attributes:
        biases: flags that are on.
        windowed: some layers, unlike others, attend to a window only.
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

    def has_bias(self, linear: Linear) -> bool:
        return linear.bias == ALWAYS or linear.bias in self.biases

    def rows(self, linear: Linear) -> list[int]:
        """Outputs of a linear, one number for each matrix that is fused into it."""
        return [self.spaces[space] for space in linear.outs]

    @cached_property
    def spaces(self) -> dict[str, int]:
        """Space -> number of neurons."""
        return {
            "residual": self.hidden_size,
            "mlp": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "kv": self.num_key_value_heads * self.head_dim,
            "vocab": self.vocab_size,
        }

    def narrowed(
        self,
        *,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_key_value_heads: int | None = None,
        tied: bool | None = None,
    ) -> Sizes:
        """The sizes after narrowing; None keeps what is.

        Query heads leave with their KV head.

        Args:
            tied: False gives a shared table a head of its own.
        """
        hidden = hidden_size or self.hidden_size
        groups = num_key_value_heads or self.num_key_value_heads
        return replace(
            self,
            hidden_size=hidden,
            intermediate_size=intermediate_size or self.intermediate_size,
            num_attention_heads=self.num_attention_heads // self.num_key_value_heads * groups,
            num_key_value_heads=groups,
            tied=self.tied if tied is None else self.tied and tied,
        )


def shapes(family: Family, sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model, by name, in the order in which narrowing makes them."""
    width = sizes.spaces
    yield f"{family.embedding}.weight", (sizes.vocab_size, sizes.hidden_size)
    for layer in range(sizes.num_layers):
        for sublayer in family.sublayers:
            for outer in filter(None, (sublayer.norm, sublayer.output_norm)):
                yield family.layer_name(layer, f"{outer}.weight"), (sizes.hidden_size,)
            widths = {linear.name: sum(sizes.rows(linear)) for linear in sublayer.readers}
            for norm in sublayer.inner_norms:
                features = sizes.head_dim if norm.per_head else widths[norm.reader]
                yield family.layer_name(layer, f"{norm.name}.weight"), (features,)
            for linear in (*sublayer.readers, sublayer.writer):
                name, rows = family.layer_name(layer, linear.name), sum(sizes.rows(linear))
                yield f"{name}.weight", (rows, width[linear.in_])
                if sizes.has_bias(linear):
                    yield f"{name}.bias", (rows,)
    yield f"{family.final_norm}.weight", (sizes.hidden_size,)
    if not sizes.tied:
        yield f"{family.head.name}.weight", (sizes.vocab_size, sizes.hidden_size)


def num_parameters(family: Family, sizes: Sizes) -> int:
    """Distinct weights; a tied embedding counts once."""
    # All layers are alike, and a search over sizes asks this thousands of times.
    repeated, once = 0, 0
    for name, shape in shapes(family, replace(sizes, num_layers=1)):
        if name.startswith(family.layer_name(0, "")):
            repeated += math.prod(shape)
        else:
            once += math.prod(shape)
    return once + sizes.num_layers * repeated


def read_sizes(family: Family, config: Mapping[str, Any]) -> Sizes:
    """The sizes a config.json declares; families name them differently, Optimum knows how.

    Raises:
        CheckpointError: a size is missing or not a positive integer.
    """
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    try:
        normal = NormalizedConfigManager.get_normalized_config_class(family.model_type)
    except KeyError:  # it knows no names of this class, which then are the usual ones
        normal = NormalizedTextConfig
    named = normal(SimpleNamespace(**config))
    heads, hidden = _size(named, "num_attention_heads"), _size(named, "hidden_size")
    return Sizes(
        hidden_size=hidden,
        intermediate_size=_size(named, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_size(named, "num_key_value_heads", default=heads),
        head_dim=_size(named, "head_dim", default=family.head_dim or hidden // heads),
        num_layers=_size(named, "num_layers"),
        vocab_size=_size(named, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
        biases=frozenset(flag for flag in family.bias_flags if config.get(flag)),
        windowed=_windowed(config),
    )


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


@cache
def supported() -> dict[str, Family]:
    """Architecture -> family table."""
    from dotexport.families.gemma2 import GEMMA2
    from dotexport.families.gemma3 import GEMMA3
    from dotexport.families.granite import GRANITE
    from dotexport.families.llama import LLAMA
    from dotexport.families.mistral import MISTRAL
    from dotexport.families.olmo2 import OLMO2
    from dotexport.families.phi3 import PHI3
    from dotexport.families.qwen2 import QWEN2
    from dotexport.families.qwen3 import QWEN3

    tables = (LLAMA, MISTRAL, GRANITE, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OLMO2)
    return {family.architecture: family for family in tables}


def find_family(config: Mapping[str, Any]) -> Family:
    """The table for the architecture that config.json names.

    Raises:
        UnsupportedModelError: no table describes it.
        CheckpointError: model_type is not that of the architecture.
    """
    known = supported()
    listed = config.get("architectures") or []
    named = [listed] if isinstance(listed, str) else [str(name) for name in listed]
    for architecture in named:
        if architecture in known:
            family = known[architecture]
            if config.get("model_type") != family.model_type:
                raise CheckpointError(
                    f"config.json gives model_type = {config.get('model_type')!r} beside "
                    f"{architecture}; expected {family.model_type!r}: take the config.json that "
                    "belongs to these weights"
                )
            _check_flags(family, config)
            return family
    what = ", ".join(named) or f"model_type {config.get('model_type')}"
    hint = "docs/adding-a-family.md shows how to add a table"
    if "text_config" in config:
        hint = (
            "it holds more than a language model: save its language model alone, under its class "
            "for causal language modelling, and narrow that"
        )
    raise UnsupportedModelError(
        f"{what} is not supported; dotexport narrows {', '.join(sorted(known))}. {hint}"
    )


def _check_flags(family: Family, config: Mapping[str, Any]) -> None:
    for flag, meaning in family.refused:
        if config.get(flag):
            raise UnsupportedModelError(
                f"config.json sets {flag}, with which {family.architecture} {meaning}; dotexport "
                "narrows decoders that see what came before"
            )


def find_carrier(family: Family, sizes: Sizes) -> Family:
    """The class that these sizes are written as: the first of the carriers that can hold them."""
    for carrier in (supported()[architecture] for architecture in family.carriers):
        whole_heads = not carrier.divides or sizes.hidden_size % sizes.num_attention_heads == 0
        if whole_heads and (carrier.windows or not sizes.windowed):
            return carrier
    return family


def carried_biases(family: Family, carrier: Family, sizes: Sizes) -> frozenset[str]:
    """The carrier's flags for biases: those that are on, and those of linears that have one."""
    on: set[str | None] = set(sizes.biases)
    apart = iter(carrier.linears)
    for linear in family.linears:
        flags = {next(apart).bias for _ in linear.outs}
        if sizes.has_bias(linear):
            on |= flags
    return frozenset(flag for flag in carrier.bias_flags if flag in on)


def check_quantised(config: Mapping[str, Any]) -> None:
    """Refuse weights that are already quantised.

    Raises:
        UnsupportedModelError: config.json has a quantization_config.
    """
    if "quantization_config" in config:
        raise UnsupportedModelError(
            "the model is already quantised (config.json has quantization_config); "
            "narrow the float model first, quantise what comes out"
        )
