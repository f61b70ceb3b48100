"""A plan, what can be asked of one, and config.json as it will be written. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dotexport.axes import AXES, axes_of
from dotexport.axes.axis import Axis
from dotexport.errors import UsageError
from dotexport.models.config_words import check_class
from dotexport.models.families import carried_biases, check_quantised, find_carrier, find_family
from dotexport.models.family import Family
from dotexport.models.rope import in_all_words
from dotexport.models.shapes import Sizes, num_parameters, read_sizes
from dotexport.options import Flag, each, option


@dataclass(frozen=True)
class Plan:
    """Sizes before and after, and what they cost.

    Attributes:
        layers: the original's layers that stay, where that was measured.
    """

    family: Family
    before: Sizes
    after: Sizes
    layers: tuple[int, ...] | None = None

    def of_layers(self, kept: Sequence[int]) -> Plan:
        """The same once it is known which of the original's layers stay."""
        if len(kept) == self.before.num_layers:
            return self
        return replace(self, after=self.after.of_layers(kept), layers=tuple(kept))

    @property
    def on_kept_tokens(self) -> Plan:
        """The same from an original with the tokens that stay: a smaller vocabulary comes first."""
        return replace(self, before=replace(self.before, vocab_size=self.after.vocab_size))

    @property
    def vocabulary_alone(self) -> bool:
        """Whether tokens leave and nothing else changes, the class neither."""
        if self.before.vocab_size == self.after.vocab_size:  # asked of each of 100,000 plans
            return False
        return self.after == self.on_kept_tokens.before

    @cached_property
    def carrier(self) -> Family:
        """The class that is written: of those that compute the same, the first that can hold it."""
        if self.vocabulary_alone:
            return self.family
        return find_carrier(self.family, self.after)

    @property
    def carried_after(self) -> Sizes:
        """The sizes after narrowing in the carrier's words: biases go by other names there."""
        if self.carrier is self.family:
            return self.after
        biases = carried_biases(self.family, self.carrier, self.after)
        after = replace(self.after, biases=biases)
        return after if self.carrier.kinds else replace(after, kinds=(), fixed=(), following=())

    @property
    def architectures(self) -> list[str]:
        """Of the original, and of what is written."""
        return [self.family.architecture, self.carrier.architecture]

    @property
    def parameters_before(self) -> int:
        return num_parameters(self.family, self.before)

    @cached_property
    def parameters_after(self) -> int:
        return num_parameters(self.carrier, self.carried_after)

    @property
    def ratio(self) -> float:
        return self.parameters_after / self.parameters_before

    @cached_property
    def kept_layers(self) -> list[int]:
        """The original's layers that stay, ascending: as measured, or as every axis has them."""
        if self.layers is not None:
            return list(self.layers)
        kept = [set(axis.layers(self.before, self.after)) for axis in axes_of(self.before)]
        return sorted(set(range(self.before.num_layers)).intersection(*kept))

    @property
    def answered_layers(self) -> list[int]:
        """The last of the original's layers that each layer that stays answers for: itself, or the
        last of those that are left out behind it."""
        return [following - 1 for following in [*self.kept_layers[1:], self.before.num_layers]]

    def sizes(self) -> dict[str, int]:
        """What is left on every axis."""
        return {axis.name: axis.size(self.after) for axis in axes_of(self.before)}

    def in_words(self) -> str:
        """The same as people read it."""
        return ", ".join(f"{axis.label} {axis.size(self.after)}" for axis in axes_of(self.before))

    def as_dict(self) -> dict[str, Any]:
        """Name of every number -> before and after."""
        axes = axes_of(self.before)
        rows = {axis.name: [axis.size(self.before), axis.size(self.after)] for axis in axes}
        for key in (*(key for axis in axes for key in axis.keys), "head_dim"):
            rows[key] = [getattr(self.before, key), getattr(self.after, key)]
        if self.before.vocab_size != self.after.vocab_size:
            rows["vocab_size"] = [self.before.vocab_size, self.after.vocab_size]
        rows["tie_word_embeddings"] = [self.before.tied, self.after.tied]
        rows["parameters"] = [self.parameters_before, self.parameters_after]
        return rows

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the narrower model: the same keys, other numbers.

        head_dim is explicit because hidden_size / heads no longer gives it. The rotary embedding
        is said in the words of all releases of transformers (models/rope.py).
        """
        changed = dict(config)
        for axis in axes_of(self.before):
            changed |= axis.config(config, self.before, self.after, self.kept_layers)
        if self.after.intermediate_size:
            changed[self.family.mlp_key] = self.after.intermediate_size
        changed["head_dim"] = self.after.head_dim
        changed |= dict.fromkeys(self.family.row_keys, self.after.vocab_size)
        changed |= dict.fromkeys(sorted(self.after.biases), True)
        changed["tie_word_embeddings"] = self.after.tied
        changed.pop("_name_or_path", None)
        return in_all_words(changed)


def read_model(config: Mapping[str, Any], *, keep_class: bool = False) -> tuple[Family, Sizes]:
    """Family table and sizes of a config.json.

    Args:
        keep_class: a table without carriers, so that what is written has the original's class.

    Raises:
        UsageError: the original's class cannot be kept.
        UnsupportedModelError: no family table, or weights that are quantised already.
        CheckpointError: sizes are missing, or transformers refuses it.
    """
    check_quantised(config)
    family = find_family(config)
    if family.kinds:  # of which the class is asked for sizes
        check_class(config)
    sizes = read_sizes(family, config)
    check_class(config)
    return (family.uncarried() if keep_class else family), sizes


def resized(sizes: Sizes, asked: Mapping[str, int]) -> Sizes:
    """With another size on every axis that is named."""
    for axis in AXES:
        if axis.name in asked:
            sizes = axis.resized(sizes, asked[axis.name])
    return sizes


def _names() -> set[str]:
    return {axis.name for axis in AXES}


def axis_flags() -> Iterator[Flag]:
    """One for each axis."""
    return (Flag(axis.flag, axis.name, int | None, axis.help, None) for axis in AXES)


@dataclass(frozen=True, kw_only=True, init=False)
class SizeOptions:
    """How narrow.

    Explicit sizes may be given by the name of their axis: `SizeOptions(hidden_size=384)`.

    Attributes:
        params: budget of parameters, `0.7x` of the original or a number such as `5.2M` or `6e9`.
        size: budget of bytes as stored, `0.7x`, `300MB` or `1.5GB`.
        latency: budget of time on this device, such as `0.8x` of the original's per decoded token
            (sizes/latency.py).
        latency_table: what was measured for it: a file, or a runtime whose table is in the cache.
        force_latency_table: take a table of another device, release or runtime.
        sizes: explicit ones by the name of their axis; the others are left to the budget, or as
            they are.
        axes: those that a budget may cut, by name with commas; None: all.
        tied: False gives a shared embedding and head tables of their own; None keeps what is.
        bias: whether linears get biases where the class has them and the original does not.
        keep_class: whether what is written has the original's class; else a class that computes
            the same may carry sizes that the original's cannot hold.
        square: whether heads leave along with the width, so that hidden_size is heads x head_dim,
            for consumers that take head_dim to be hidden_size / heads (sizes/square.py).
        vocab_size: rows of the tables, of a vocabulary that was chosen before (vocabulary/); None:
            all stay. No flag: it follows from those of the vocabulary.
    """

    params: str | None = option(
        None, help="Parameter budget: 0.7x, 5.2M, 6e9. Sizes are then chosen."
    )
    size: str | None = option(None, help="Budget of bytes as stored: 0.7x, 300MB, 1.5GB.")
    latency: str | None = option(
        None,
        help="Budget of time per decoded token: 0.8x of the original's, or 12ms; prefill:0.8x for "
        "prompts, 0.8x@4 for batches of 4.",
    )
    latency_table: str | None = option(
        None,
        help="What dotexport latency measured: its file, or the runtime (ort-cpu:int4) whose table "
        "is in the cache; default: the one in the cache, or torch timed on the spot.",
    )
    force_latency_table: bool = option(
        False,
        help="Take a table of another device, release or runtime.",
        words=("--force-latency-table",),
    )
    sizes: Mapping[str, int] = each(axis_flags)
    axes: str | None = option(
        None,
        help="Axes that share the budget, by name with commas (intermediate_size,"
        "num_hidden_layers); default: all.",
    )
    tied: bool | None = option(
        None,
        help="Whether a shared embedding and head stay shared when the residual width is cut.",
        words=("--tied/--untied",),
    )
    bias: bool = option(
        False,
        help="Give linears biases where the class has them.",
        words=("--bias/--no-bias",),
    )
    keep_class: bool = option(
        False,
        help="Write the original's class, whatever sizes another one that computes the same would "
        "hold (Mistral those of a Llama that are no multiple of its heads).",
        words=("--keep-class",),
    )
    square: bool = option(
        False,
        help="Drop heads along with the width, so that hidden_size == heads x head_dim, for "
        "consumers that take head_dim to be hidden_size / heads.",
        words=("--square",),
    )
    vocab_size: int | None = None

    def __init__(
        self,
        *,
        params: str | None = None,
        size: str | None = None,
        latency: str | None = None,
        latency_table: str | None = None,
        force_latency_table: bool = False,
        sizes: Mapping[str, int] | None = None,
        axes: str | None = None,
        tied: bool | None = None,
        bias: bool = False,
        keep_class: bool = False,
        square: bool = False,
        vocab_size: int | None = None,
        **by_axis: int | None,
    ) -> None:
        if strange := sorted(set(by_axis) - _names()):
            known = ", ".join(sorted(_names()))
            raise TypeError(f"{strange[0]!r} is no axis; known: {known}")
        named = {name: number for name, number in by_axis.items() if number is not None}
        given = {
            "params": params,
            "size": size,
            "latency": latency,
            "latency_table": latency_table,
            "force_latency_table": force_latency_table,
            "sizes": {**(sizes or {}), **named},
            "axes": axes,
            "tied": tied,
            "bias": bias,
            "keep_class": keep_class,
            "square": square,
            "vocab_size": vocab_size,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if sum(budget is not None for budget in (self.params, self.size, self.latency)) > 1:
            raise UsageError("give one budget: --params, --size or --latency")
        if self.latency is None and (self.latency_table or self.force_latency_table):
            raise UsageError("--latency-table serves a budget of time; give --latency 0.8x as well")
        if self.axes is not None and not self.budgeted:
            raise UsageError("--axes says which axes share a budget; give --params 0.7x as well")
        if self.axes is not None and (strange := set(self.axes.split(",")) - _names()):
            known = ", ".join(sorted(_names()))
            raise UsageError(f"--axes names {sorted(strange)[0]!r}; expected some of {known}")

    def may_cut(self, axis: Axis) -> bool:
        """Whether a budget may cut an axis."""
        if self.axes is None:
            return axis.timed or self.latency is None
        return axis.name in self.axes.split(",")

    @property
    def budgeted(self) -> bool:
        return any(budget is not None for budget in (self.params, self.size, self.latency))

    @property
    def explicit(self) -> bool:
        return bool(self.sizes)

    def finished(self, family: Family, sizes: Sizes) -> Sizes:
        """Sizes that were found, with what is asked of tables, their rows and biases besides."""
        after = sizes if self.tied is None else replace(sizes, tied=sizes.tied and self.tied)
        if self.vocab_size:
            after = replace(after, vocab_size=self.vocab_size)
        if not self.bias:
            return after
        return replace(after, biases=after.biases | find_carrier(family, after).bias_flags)
