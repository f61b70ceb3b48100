"""Two published ways to drop layers without training, for a table to stand beside ours.

ShortGPT (arXiv 2403.03853, eq. 1) drops the layers whose output is most like their input by cosine.
ReplaceMe (arXiv 2505.02819, sec. 3) drops the block whose two ends are most alike, and folds into
the down projection in front of it the linear map that best leads to the stream behind it.

Shapes: N windows, L tokens of one, T of all, D hidden_size.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

RIVALS = ("ShortGPT", "ReplaceMe")


@torch.no_grad()
def without_layers(rival: str, source: Path, out: Path, count: int, windows_NL: Tensor) -> str:
    """Write OUT, the model without `count` layers; says which left."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = model.model.layers
    seen = _Seen.of(model, windows_NL)
    if rival == "ShortGPT":
        alike = [seen.alike(number, number + 1) for number in range(len(layers))]
        gone = sorted(sorted(range(len(layers)), key=alike.__getitem__)[-count:])
    else:
        starts = range(1, len(layers) - count + 1)
        first = max(starts, key=lambda start: seen.alike(start, start + count))
        gone = list(range(first, first + count))
        _fold(layers[first - 1], seen, model, windows_NL, first, first + count)
    _save(model, gone, source, out)
    return f"without {', '.join(map(str, gone))}"


@dataclass
class _Seen:
    """What enters each layer, and what leaves the last, (T, D) each."""

    streams: Sequence[Tensor]

    @classmethod
    def of(cls, model: Any, windows_NL: Tensor) -> _Seen:
        # transformers gives the last of its hidden states behind the final norm.
        behind: list[Tensor] = []
        last = model.model.layers[-1].register_forward_hook(
            lambda module, given, found: behind.append(_first(found))
        )
        parts = []
        for window in windows_NL:
            states = model.model(window[None], output_hidden_states=True).hidden_states
            parts.append([state[0] for state in states[:-1]])
        last.remove()
        parts = [[*part, end[0]] for part, end in zip(parts, behind, strict=True)]
        return cls([torch.cat(streams) for streams in zip(*parts, strict=True)])

    def alike(self, start: int, end: int) -> float:
        return float(cosine_similarity(self.streams[start], self.streams[end], dim=-1).mean())


def _fold(
    layer: nn.Module, seen: _Seen, model: Any, windows_NL: Tensor, start: int, end: int
) -> None:
    """argmin_A |M A + Y - X_end|^2 into the down projection: M what the MLP gives, Y its stream."""
    given: list[Tensor] = []
    mlp: Any = layer.mlp
    hook = mlp.register_forward_hook(lambda module, seen, found: given.append(found[0]))
    for window in windows_NL:
        model.model(window[None])
    hook.remove()
    mlp_TD = torch.cat(given).double()
    missing_TD = seen.streams[end].double() - (seen.streams[start].double() - mlp_TD)
    map_DD = torch.linalg.lstsq(mlp_TD, missing_TD).solution
    mlp.down_proj.weight.copy_((map_DD.T @ mlp.down_proj.weight.double()).float())


def _first(found: Any) -> Tensor:
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor


def _save(model: Any, gone: Sequence[int], source: Path, out: Path) -> None:
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in gone]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        kinds = model.config.layer_types
        model.config.layer_types = [k for number, k in enumerate(kinds) if number not in gone]
    model.save_pretrained(out)
    for file in source.glob("*token*"):
        shutil.copyfile(file, out / file.name)
