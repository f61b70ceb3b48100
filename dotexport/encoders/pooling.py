"""From token vectors to an embedding, as a folder of sentence-transformers says it: mean or first
token, a linear layer where there is one, unit length.

Shapes: N sentences, L tokens of one, D width of the stream, K of a narrower one, E of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.kinds import MODULES
from dotexport.encoders.linear import put
from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
DENSE, WEIGHTS = "Dense", "model.safetensors"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
"""Of torch.nn, what a linear layer may end with."""
PLAIN = "torch.nn.modules.linear.Identity"
WIDTHS = ("word_embedding_dimension", "embedding_dimension")
"""How releases of sentence-transformers write the width of the stream beside the pooling."""


@dataclass(frozen=True)
class Pooling:
    """What is made of token vectors.

    Attributes:
        mode: `mean` or `cls`.
        dense: a linear layer and its activation, behind it.
    """

    mode: str = "mean"
    dense: nn.Sequential | None = None

    def __call__(self, hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        """Embeddings of unit length, (N, E)."""
        if self.mode == "cls":
            found_ND = hidden_NLD[:, 0]
        else:
            mask_NL1 = mask_NL[..., None].to(hidden_NLD.dtype)
            found_ND = (hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1)
        if self.dense is not None:
            found_ND = self.dense(found_ND)
        return nn.functional.normalize(found_ND, dim=-1)


def pooling_of(encoder: Encoder) -> Pooling:
    """What the folder's modules.json says; the mean of all tokens where there is none.

    Raises:
        UnsupportedModelError: another pooling, or modules behind it that are not known here.
        CheckpointError: a linear layer without its weights.
    """
    file, mode, dense = encoder.root / MODULES, "mean", None
    if not file.is_file():
        return Pooling()
    for module in _modules(encoder.root):
        word, place = _word(module), encoder.root / module["path"]
        if word == "Pooling":
            mode = _mode(place / "config.json")
        elif word == DENSE and dense is None:
            dense = _dense(place)
        elif word not in ("Transformer", "Normalize"):
            raise UnsupportedModelError(
                f"{file} has a module {word}; expected Transformer, Pooling, at most one Dense, "
                "and Normalize"
            )
    return Pooling(mode, dense)


def _modules(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / MODULES).read_text(encoding="utf-8"))
    return found


def _word(module: dict[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _mode(file: Path) -> str:
    said: dict[str, Any] = read_json(file, advice="take a fresh copy")
    named = [key for key, value in said.items() if "_mode" in key and value]
    names = [POOLINGS.get(key) for key in named]
    if said.get("pooling_mode") in ("mean", "cls"):  # as later releases write it
        names = [said["pooling_mode"]]
    if len(names) != 1 or names[0] is None:
        raise UnsupportedModelError(
            f"{file} pools by {', '.join(named)}; expected mean or cls alone"
        )
    return names[0]


def _dense(place: Path) -> nn.Sequential:
    said = read_json(place / "config.json", advice="take a fresh copy")
    activation = str(said.get("activation_function", "")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{place} ends with {activation or 'no activation that it names'}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    try:
        tensors = safetensors.torch.load_file(place / WEIGHTS)
        weight_ED, bias_E = tensors["linear.weight"].float(), tensors.get("linear.bias")
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{place} has no {WEIGHTS} with a linear.weight; save the model once more with "
            "sentence-transformers, which writes it"
        ) from error
    linear = nn.Linear(weight_ED.shape[1], weight_ED.shape[0], bias=bias_E is not None)
    put(linear, weight_ED, None if bias_E is None else bias_E.float())
    return nn.Sequential(linear, getattr(nn, activation)()).requires_grad_(False)


def adds_dense(encoder: Encoder) -> bool:
    """Whether a narrower stream needs a linear layer behind the pooling that was not there."""
    return (encoder.root / MODULES).is_file() and pooling_of(encoder).dense is None


def write_back(folder: Path, back: nn.Linear, dtype: torch.dtype) -> None:
    """Take embeddings back to the original's width: by a linear layer behind the pooling, or in the
    one that is there.

    Args:
        folder: of sentence-transformers, with modules of the original.
        back: from the narrower stream, (D, K).
    """
    modules = _modules(folder)
    pooling = next(n for n, module in enumerate(modules) if _word(module) == "Pooling")
    weight, bias = back.weight.detach().double(), back.bias.detach().double()
    _say_width(folder / modules[pooling]["path"] / "config.json", back)
    found = next((module for module in modules if _word(module) == DENSE), None)
    if found is not None:
        place = folder / found["path"]
        said = read_json(place / "config.json", advice="take a fresh copy")
        there: Any = _dense(place)[0]
        weight, bias = there.weight.double() @ weight, there.weight.double() @ bias
        if there.bias is not None:
            bias = bias + there.bias.double()
    else:
        place = folder / _free(folder, f"{pooling + 1}_{DENSE}")
        said = {"out_features": len(weight), "activation_function": PLAIN}
        entry = {"path": place.name, "type": f"sentence_transformers.models.{DENSE}"}
        modules.insert(pooling + 1, entry)
        for number, module in enumerate(modules):
            module |= {"idx": number, "name": str(number)}
        order = ("idx", "name", "path", "type")
        write_json(
            folder / MODULES,
            [{**{word: module[word] for word in order}, **module} for module in modules],
        )
    place.mkdir(exist_ok=True)
    write_json(place / "config.json", said | {"in_features": weight.shape[1], "bias": True})
    tensors = {"linear.weight": weight.to(dtype), "linear.bias": bias.to(dtype)}
    safetensors.torch.save_file(tensors, place / WEIGHTS)


def _say_width(file: Path, back: nn.Linear) -> None:
    said = read_json(file, advice="take a fresh copy")
    changed = {word: back.in_features for word in WIDTHS if word in said}
    if changed:
        write_json(file, said | changed)


def _free(folder: Path, name: str) -> str:
    """A name that no other folder has."""
    while (folder / name).exists():
        name += "_"
    return name


def embed(
    base: nn.Module, some: Sequence[Any], pooling: Pooling, back: nn.Module | None = None
) -> Tensor:
    """Embeddings of all sentences, (N, E).

    Args:
        some: batches of sentences.
        back: from a narrower stream to the one that `pooling` is of.
    """
    found = []
    with torch.no_grad():
        for batch in some:
            hidden_NLD = base(**batch.inputs).last_hidden_state
            hidden_NLD = hidden_NLD if back is None else back(hidden_NLD)
            found.append(pooling(hidden_NLD, batch.mask))
    return torch.cat(found)


def mean_cosine(ours_ND: Tensor, theirs_ND: Tensor) -> float:
    """Of embeddings of the same sentences."""
    return float((ours_ND * theirs_ND).sum(-1).mean())
