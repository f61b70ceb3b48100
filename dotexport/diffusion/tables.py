"""One table per denoiser class: which linear layers read and write the same heads and neurons.

A site is a set of units (attention heads, or feed-forward neurons) that can leave together. Its
readers lose rows and its writers lose columns; nothing else of the model knows them. Everything
that prunes, counts or resizes follows from these tables, and no class has code of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dotexport.errors import UnsupportedModelError

Kind = Literal["heads", "ffn"]
QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
OUT = ("to_out.0", "to_add_out")


@dataclass(frozen=True)
class Sites:
    """A line of a table: all places of one kind.

    Attributes:
        at: name of the module, `*` for a number.
        kind: what its units are.
        readers, writers: linear layers, relative to `at`; a leading `^` starts at its parent. What
            a block does not have (the last one of SD3, say) is passed over.
        last: the units are the last columns of a writer that others share, not the first ones.
    """

    at: str
    kind: Kind
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True)
class Table:
    """What can be pruned in one class.

    Attributes:
        field: entry of the stock config that says the width of every feed-forward layer.
        per: entry whose value it is a multiple of (`mlp_ratio`); None: it is the width itself.
    """

    lines: tuple[Sites, ...]
    field: str | None = None
    per: str | None = None


def heads(at: str, *, writers: tuple[str, ...] = OUT) -> Sites:
    return Sites(at, "heads", QKV, writers)


def ffn(at: str, *, readers: tuple[str, ...] = ("net.0.proj",), writer: str = "net.2") -> Sites:
    return Sites(at, "ffn", readers, (writer,))


UNET = ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*")
DIT = (
    heads("transformer_blocks.*.attn1"),
    heads("transformer_blocks.*.attn2"),
    ffn("transformer_blocks.*.ff"),
)
JOINT = (
    heads("transformer_blocks.*.attn"),
    heads("transformer_blocks.*.attn2"),
    ffn("transformer_blocks.*.ff"),
    ffn("transformer_blocks.*.ff_context"),
)
TABLES: dict[str, Table] = {
    "SD3Transformer2DModel": Table(JOINT),
    "FluxTransformer2DModel": Table(
        (
            *JOINT,
            heads("single_transformer_blocks.*.attn", writers=("^.proj_out",)),
            Sites("single_transformer_blocks.*", "ffn", ("proj_mlp",), ("proj_out",), last=True),
        )
    ),
    "DiTTransformer2DModel": Table(DIT),
    "PixArtTransformer2DModel": Table(DIT),
    "UNet2DConditionModel": Table(
        tuple(
            line(f"{at}.transformer_blocks.*.{name}")
            for at in UNET
            for line, name in ((heads, "attn1"), (heads, "attn2"), (ffn, "ff"))
        )
    ),
    "WanTransformer3DModel": Table((ffn("blocks.*.ffn"),), field="ffn_dim"),
    "PRXTransformer2DModel": Table(
        (ffn("blocks.*", readers=("gate_proj", "up_proj"), writer="down_proj"),),
        field="mlp_ratio",
        per="hidden_size",
    ),
}


@dataclass(frozen=True)
class Site:
    """Units of one module that leave together.

    Attributes:
        name: the module.
        units, size: how many units, and how many features each one has.
        readers: linear layers whose rows they are, possibly several times (GEGLU twice).
        writers: linear layers whose columns they are.
        last: whether they are the last columns of the writers.
    """

    name: str
    kind: Kind
    units: int
    size: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    last: bool = False

    def rows(self, model: nn.Module, reader: str) -> Tensor:
        """Indices of the rows of a reader, as (N, parts x size): unit by unit."""
        parts = linear(model, reader).out_features // (self.units * self.size)
        index = torch.arange(parts * self.units * self.size).view(parts, self.units, self.size)
        return index.transpose(0, 1).reshape(self.units, -1)

    def columns(self, model: nn.Module, writer: str) -> Tensor:
        """Indices of the columns of a writer, as (N, size)."""
        width = self.units * self.size
        first = linear(model, writer).in_features - width if self.last else 0
        return torch.arange(first, first + width).view(self.units, self.size)

    def cost(self, model: nn.Module) -> int:
        """Parameters that leave with one unit."""
        layers = [linear(model, name) for name in self.readers]
        rows = sum(
            len(self.rows(model, name)[0]) * (layer.in_features + (layer.bias is not None))
            for name, layer in zip(self.readers, layers, strict=True)
        )
        return rows + sum(self.size * linear(model, name).out_features for name in self.writers)


def linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)  # `find_sites` saw to it
    return layer


def find_table(model: nn.Module) -> Table:
    """The table of a model's class, or of the stock class that a pruned one extends.

    Raises:
        UnsupportedModelError: there is none.
    """
    for base in type(model).__mro__:
        if base.__name__ in TABLES:
            return TABLES[base.__name__]
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be pruned yet; there are tables for {', '.join(TABLES)}"
    )


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a model, in the order in which its blocks stand.

    Raises:
        UnsupportedModelError: no table, or one that finds nothing in this model.
    """
    lines = find_table(model).lines
    found = [
        site
        for name, module in model.named_modules()
        for line in lines
        if _matches(line.at, name) and (site := _site(model, name, module, line))
    ]
    if not found:
        raise UnsupportedModelError(f"this {type(model).__name__} has no layers that can be pruned")
    return found


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _site(model: nn.Module, name: str, module: nn.Module, line: Sites) -> Site | None:
    readers = tuple(_present(model, name, line.readers))
    writers = tuple(_present(model, name, line.writers))
    if not readers or not writers:
        return None
    if line.kind == "heads":
        units, width = int(getattr(module, "heads", 0)), linear(model, readers[0]).out_features
        if not _separable(model, module, units, readers, width):
            return None
        return Site(name, "heads", units, width // units, readers, writers)
    units = linear(model, writers[0]).in_features
    if line.last:  # what is left of the shared writer belongs to the reader
        units = linear(model, readers[0]).out_features
    if any(linear(model, reader).out_features % units for reader in readers):
        return None
    return Site(name, "ffn", units, 1, readers, writers, line.last)


def _separable(
    model: nn.Module, module: nn.Module, units: int, readers: tuple[str, ...], width: int
) -> bool:
    """Whether heads can leave: keys of their own, and no norm that runs across several heads."""
    if not units or any(linear(model, reader).out_features != width for reader in readers):
        return False
    norms = (getattr(module, name, None) for name in ("norm_q", "norm_k"))
    weights = (getattr(norm, "weight", None) for norm in norms)
    return all(weight is None or weight.numel() == width // units for weight in weights)


def _present(model: nn.Module, at: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        base = at.rpartition(".")[0] if name.startswith("^.") else at
        full = f"{base}.{name.removeprefix('^.')}"
        try:
            layer = model.get_submodule(full)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            yield full


def attributes(module: nn.Module, site: Site, units: int) -> Mapping[str, Any]:
    """Integers of the site's own module that follow the number of units."""
    wanted = {"mlp_hidden_dim": units}
    if site.kind == "heads":
        width = units * site.size
        wanted = {"heads": units, "sliceable_head_dim": units}
        wanted |= {"inner_dim": width, "inner_kv_dim": width}
    return {name: value for name, value in wanted.items() if hasattr(module, name)}
