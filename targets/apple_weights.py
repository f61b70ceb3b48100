"""What mlx-lm reads in a folder, held against the checkpoint that it was written from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from .stored_rows import Limits, wrong_rows

WHOLE: Limits = (1e-6, 1e-6)
# A GPU may decide otherwise than a CPU where two levels are equally near.
ROUNDED: Limits = (0.05, 2e-3)


def wrong_in_file(
    folder: Path, words: Mapping[str, Any], tensors: Iterable[tuple[str, NDArray[np.float32]]]
) -> list[str]:
    """Every size and setting and every tensor that is not what it should be.

    Args:
        words: what config.json should say.
        tensors: name and values, one after another.
    """
    model, _ = load_model(folder, lazy=True)
    return [*_settings(model.args, words), *_weights(model, tensors)]


def _settings(said: Any, words: Mapping[str, Any]) -> Iterator[str]:
    """`said` is what mlx-lm's class takes from config.json."""
    meant = type(said).from_dict(words)
    for field in fields(said):
        found, wanted = getattr(said, field.name), getattr(meant, field.name)
        if found != wanted:
            yield f"mlx-lm reads {field.name} = {found!r}, and the checkpoint means {wanted!r}"


def _weights(model: Any, tensors: Iterable[tuple[str, NDArray[np.float32]]]) -> Iterator[str]:
    """The checkpoint's tensors are rounded again, as those in the file say that they were."""
    stored, modules = dict(tree_flatten(model.parameters())), dict(model.named_modules())
    for name, true_RI in tensors:
        module = name.removesuffix(".weight")
        scales = stored.get(f"{module}.scales")
        true = mx.array(true_RI).astype(stored[name].dtype if scales is None else scales.dtype)
        found, limits = stored[name], WHOLE
        if scales is not None:
            groups = {"group_size": modules[module].group_size, "bits": modules[module].bits}
            found = mx.dequantize(found, scales, stored[f"{module}.biases"], **groups)
            true, limits = mx.dequantize(*mx.quantize(true, **groups), **groups), ROUNDED
        if said := wrong_rows(name, _whole(found), _whole(true), limits):
            yield said


def _whole(array: Any) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))
