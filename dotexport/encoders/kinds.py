"""Which encoders can be narrowed, and where their parts lie. Imports no library.

All are post-norm: a sublayer adds what its writer says to the stream, and a norm follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.storage.reading import read_json

STOCK = "hf"
MODULES = "modules.json"
OUTPUTS = {
    "Model": ("last_hidden_state",),
    "ForMaskedLM": ("logits",),
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
}
"""How a class ends -> what it answers with, under the names that ONNX readers expect."""


@dataclass(frozen=True)
class Kind:
    """Names of one kind, those of modules below a layer.

    Attributes:
        stack: the layers, below the base model.
        attention, attention_norm: what the attention writes with, and the norm behind it.
        reader, activation, writer, norm: of the MLP.
        width, depth: words of config.json.
        counts_from_padding: whether the first position is the one behind the id of padding.
    """

    prefix: str
    stack: str = "encoder.layer"
    attention: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    reader: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    writer: str = "output.dense"
    norm: str = "output.LayerNorm"
    width: str = "intermediate_size"
    depth: str = "num_hidden_layers"
    counts_from_padding: bool = False


DISTIL = Kind(
    "DistilBert",
    "transformer.layer",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.activation",
    "ffn.lin2",
    "output_layer_norm",
    "hidden_dim",
    "n_layers",
)
KINDS = {
    "bert": Kind("Bert"),
    "roberta": Kind("Roberta", counts_from_padding=True),
    "xlm-roberta": Kind("XLMRoberta", counts_from_padding=True),
    "distilbert": DISTIL,
}
"""model_type -> its names."""


def transformer_of(folder: Path) -> Path:
    """Where config.json and weights lie: in a folder of sentence-transformers its first module.

    Raises:
        CheckpointError: modules.json names a folder outside.
    """
    inside = folder / STOCK
    folder = inside if inside.is_dir() else folder
    file = folder / MODULES
    if not file.is_file():
        return folder
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = next(entry["path"] for entry in said if _word(entry) == "Transformer")
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{file} names no Transformer; expected sentence-transformers' list of modules: take a "
            "fresh copy"
        ) from error
    home: Path = folder / found
    if not home.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{file} names {found}, which lies outside of {folder}")
    return home


def _word(entry: Mapping[str, Any]) -> str:
    return str(entry["type"]).rpartition(".")[2]


def holds_encoder(folder: Path) -> bool:
    """Whether a folder, or what an output of dotexport holds, is a text encoder."""
    if (folder / MODULES).is_file() or (folder / STOCK / MODULES).is_file():
        return True
    if not (file := transformer_of(folder) / "config.json").is_file():
        return False
    try:
        config = read_json(file, advice="take a fresh copy")
    except CheckpointError:  # the verb that reads it says so
        return False
    return config.get("model_type") in KINDS


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The names that belong to a config.json.

    Raises:
        UnsupportedModelError: another kind of model, or a decoder of that kind.
    """
    found = KINDS.get(str(config.get("model_type")))
    if found is None:
        raise UnsupportedModelError(
            f"config.json says model_type {config.get('model_type')!r}; of text encoders dotexport "
            f"narrows {', '.join(KINDS)}"
        )
    for flag in ("is_decoder", "add_cross_attention", "quantization_config"):
        if config.get(flag):
            raise UnsupportedModelError(
                f"config.json sets {flag}; expected a float encoder that sees all of its text"
            )
    return found


def outputs_of(name: str) -> tuple[str, ...]:
    """What a stock class of this name answers with."""
    return next(outputs for end, outputs in OUTPUTS.items() if name.endswith(end))


def reads_segments(config: Mapping[str, Any]) -> bool:
    """Whether token_type_ids say anything: BERT alone has more than one kind of them."""
    return kind_of(config).prefix == "Bert"


def class_of(config: Mapping[str, Any]) -> str:
    """Name of the stock class.

    Raises:
        UnsupportedModelError: architectures names one that is not known here.
    """
    prefix = kind_of(config).prefix
    named = (config.get("architectures") or [f"{prefix}Model"])[0]
    known = [f"{prefix}{head}" for head in OUTPUTS]
    if named not in known:
        raise UnsupportedModelError(
            f"config.json names the class {named}; expected one of {', '.join(known)}"
        )
    return str(named)
