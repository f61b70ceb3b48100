"""Diffusion models whose layers have other widths than their configs can say.

This file is complete in itself: it needs diffusers and torch only, and lies as `pruned.py` beside
the weights of every pruned model, for `AutoModel.from_pretrained(..., trust_remote_code=True)`.

`PrunedX` is the diffusers class `X` with one more entry in its config, `pruned_layout`: a list of

    {"module": "transformer_blocks.0.attn", "heads": 3, "inner_dim": 48}
    {"module": "transformer_blocks.0.attn.to_q", "out_features": 48}

Each names a submodule and integers to set on it; the weights of a Linear follow. The class has a
name of its own so that stock diffusers refuses the checkpoint: under the stock name it would
suggest `ignore_mismatched_sizes=True`, which loads random weights without another word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it where it finds the class
from torch import nn

PREFIX = "Pruned"
Layout = Sequence[Mapping[str, Any]]


def resize(model: nn.Module, layout: Layout) -> None:
    """Set what a layout says; the weights of resized layers are empty until they are loaded.

    Raises:
        ValueError: an entry names something that the model does not have.
    """
    for entry in layout:
        try:
            module = model.get_submodule(entry["module"])
            for name in entry.keys() - {"module"}:
                _set(module, name, entry[name])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"pruned_layout does not fit {type(model).__name__}: {error} (entry {entry})"
            ) from error
        if isinstance(module, nn.Linear):
            _reallocate(module)


def _set(module: nn.Module, name: str, value: int) -> None:
    if not isinstance(getattr(module, name), int) or not isinstance(value, int) or value < 1:
        raise TypeError(f"{name} must be a positive integer, not {value!r}")
    setattr(module, name, value)


def _reallocate(linear: nn.Linear) -> None:
    shape = (linear.out_features, linear.in_features)
    if linear.weight.shape != shape:
        linear.weight = nn.Parameter(linear.weight.new_empty(shape))
    if linear.bias is not None and linear.bias.shape != shape[:1]:
        linear.bias = nn.Parameter(linear.bias.new_empty(shape[:1]))


def class_name(stock: str) -> str:
    """Name of the class that holds pruned models of a stock class."""
    return stock if stock.startswith(PREFIX) else PREFIX + stock


@functools.cache
def pruned_class(stock: str) -> Any:
    """The subclass of `diffusers.<stock>` that takes a `pruned_layout`."""
    base = getattr(diffusers, stock)

    def __init__(  # noqa: N807  the one of the class below
        self: Any,
        *args: Any,
        pruned_layout: Layout = (),
        auto_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(pruned_layout=[dict(entry) for entry in pruned_layout])
        if auto_map is not None:
            self.register_to_config(auto_map=auto_map)
        resize(self, pruned_layout)

    own = [
        inspect.Parameter("pruned_layout", inspect.Parameter.KEYWORD_ONLY, default=()),
        inspect.Parameter("auto_map", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    stock_signature = inspect.signature(base.__init__)
    # diffusers reads from the signature which entries of a config a class takes.
    __init__.__signature__ = stock_signature.replace(  # type: ignore[attr-defined]
        parameters=[*stock_signature.parameters.values(), *own]
    )
    members = {"__init__": __init__, "__module__": __name__, "__doc__": f"{stock}, pruned."}
    return type(class_name(stock), (base,), members)


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) and hasattr(diffusers, stock):
        return pruned_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
