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

from dotexport.encoders.encoder_folder import WEIGHTS as FORMS
from dotexport.encoders.encoder_folder import Encoder
from dotexport.encoders.kinds import MODULES, module_kind
from dotexport.encoders.linear import put
from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.models.checkpoint import all_finite
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
DENSE, WEIGHTS = "Dense", "model.safetensors"
CHAIN = ("Transformer", "Pooling", DENSE, "Normalize")
"""Modules in the only order that is read here; none but the first has to be there."""
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
"""Of torch.nn, what a linear layer may end with."""
PLAIN = "torch.nn.modules.linear.Identity"
READS, SAYS = "module_input_name", "module_output_name"
SENTENCE = "sentence_embedding"
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

    def pooled(self, hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        """What is made of the vectors of all tokens, (N, D)."""
        if self.mode == "cls":
            return hidden_NLD[:, 0]
        mask_NL1 = mask_NL[..., None].to(hidden_NLD.dtype)
        return (hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1)

    def __call__(self, hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        """Embeddings of unit length, (N, E)."""
        found_ND = self.pooled(hidden_NLD, mask_NL)
        if self.dense is not None:
            found_ND = self.dense(found_ND)
        return nn.functional.normalize(found_ND, dim=-1)


def pools(encoder: Encoder) -> bool:
    """Whether the folder says how token vectors become an embedding."""
    return any(word == "Pooling" for word, _ in _modules(encoder.root))


def pooling_of(encoder: Encoder) -> Pooling:
    """What the folder's modules.json says; the mean of all tokens where it says nothing.

    Raises:
        UnsupportedModelError: another pooling, or modules that are not known here.
        CheckpointError: modules.json, or what it names, is damaged.
    """
    mode, dense = "mean", None
    modules = _modules(encoder.root)
    words = [word for word, _ in modules]
    if words != [word for word in CHAIN if word in words] or DENSE in words[:2]:
        raise UnsupportedModelError(
            f"{encoder.root / MODULES} has modules {', '.join(words)}; expected some of "
            f"{', '.join(CHAIN)}, in this order"
        )
    for word, place in modules:
        if word == "Pooling":
            mode = _mode(place / "config.json")
        elif word == DENSE:
            dense = _dense(place)
    if dense is not None and dense[0].in_features != encoder.hidden_size:
        raise CheckpointError(
            f"{encoder.root / MODULES} has a linear layer that reads {dense[0].in_features} values "
            f"of token vectors of {encoder.hidden_size}; take the one that belongs to these weights"
        )
    return Pooling(mode, dense)


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Kinds of modules and their folders.

    Raises:
        CheckpointError: the list is damaged, or names a folder outside.
    """
    if not (file := root / MODULES).is_file():
        return []
    try:
        listed = [(module_kind(module), str(module["path"])) for module in _entries(root)]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is no list of modules as sentence-transformers writes it; take a fresh copy"
        ) from error
    for _, path in listed:
        if not (root / path).resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file} names {path}, which lies outside of {root}")
    return [(word, root / path) for word, path in listed]


def _entries(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / MODULES).read_text(encoding="utf-8"))
    return found


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
    """Raises: UnsupportedModelError, CheckpointError."""
    said = read_json(place / "config.json", advice="take a fresh copy")
    activation = str(said.get("activation_function", "")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{place} ends with {activation or 'no activation that it names'}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    for word, plain in (("use_residual", False), (READS, SENTENCE), (SAYS, SENTENCE)):
        if said.get(word) not in (None, plain):
            raise UnsupportedModelError(
                f"{place} sets {word} = {said[word]}; expected a linear layer from embedding to "
                "embedding and nothing beside it"
            )
    try:
        tensors = safetensors.torch.load_file(place / WEIGHTS)
        weight_ED, bias_E = tensors["linear.weight"].float(), tensors.get("linear.bias")
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{place} has no {WEIGHTS} with a linear.weight; save the model once more with "
            "sentence-transformers, which writes it"
        ) from error
    shape = (said.get("out_features"), said.get("in_features"))
    held = [weight_ED] if bias_E is None else [weight_ED, bias_E.float()]
    fits = tuple(weight_ED.shape) == shape and all(len(x) == len(weight_ED) for x in held)
    if not (fits and held[-1].ndim == 3 - len(held) and all(map(all_finite, held))):
        raise CheckpointError(
            f"{place / WEIGHTS} is not the finite matrix of {shape} that config.json tells of; "
            "take a fresh copy"
        )
    linear = nn.Linear(weight_ED.shape[1], weight_ED.shape[0], bias=bias_E is not None)
    put(linear, weight_ED, None if bias_E is None else held[1])
    return nn.Sequential(linear, getattr(nn, activation)()).requires_grad_(False)


def width_of(encoder: Encoder) -> int:
    """Of its embeddings, E."""
    dense: Any = pooling_of(encoder).dense
    return dense[0].out_features if dense else encoder.hidden_size


def dense_parameters(encoder: Encoder, hidden_size: int, before: int) -> int:
    """Of the linear layer behind the pooling, where there is one beside a stream as wide.

    Args:
        before: the width of the original's.
    """
    dense = pooling_of(encoder).dense
    if hidden_size == before:
        return sum(x.numel() for x in dense.parameters()) if dense else 0
    if not pools(encoder):
        return 0
    linear: Any = dense[0] if dense else None
    width: int = linear.out_features if linear else before
    return width * (hidden_size + 1)


def write_back(folder: Path, back: nn.Linear, dtype: torch.dtype) -> None:
    """Take embeddings back to the original's width: by a linear layer behind the pooling, or in the
    one that is there.

    Args:
        folder: of sentence-transformers, with modules of the original.
        back: from the narrower stream, (D, K).
    """
    modules, listed = _modules(folder), _entries(folder)
    words = [word for word, _ in modules]
    pooling = words.index("Pooling")
    weight, bias = back.weight.detach().double(), back.bias.detach().double()
    _say_width(modules[pooling][1] / "config.json", back)
    if DENSE in words:
        place = modules[words.index(DENSE)][1]
        said = read_json(place / "config.json", advice="take a fresh copy")
        there: Any = _dense(place)[0]
        weight, bias = there.weight.double() @ weight, there.weight.double() @ bias
        if there.bias is not None:
            bias = bias + there.bias.double()
        for other in place.iterdir():  # the same weights in another form
            if other.name != WEIGHTS and any(map(other.match, FORMS)):
                other.unlink()
    else:
        place = folder / _free(folder, f"{pooling + 1}_{DENSE}")
        said = {"out_features": len(weight), "activation_function": PLAIN}
        entry: dict[str, Any] = {"idx": 0, "name": "", "path": place.name}
        entry["type"] = f"sentence_transformers.models.{DENSE}"
        listed.insert(pooling + 1, entry)
        for number, module in enumerate(listed):
            module |= {"idx": number, "name": str(number)}
        write_json(folder / MODULES, listed)
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
