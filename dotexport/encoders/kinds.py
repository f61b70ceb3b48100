"""Which encoders can be narrowed, and where their parts lie. Imports no library.

A sublayer adds what its writer says to the stream. Post-norm kinds have a norm right behind it;
in pre-norm kinds (ModernBERT) the norm that reads the stream next is the next sublayer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.storage.reading import read_json

STOCK = "hf"
MODULES = "modules.json"
TYPES, PERIOD = "layer_types", "global_attn_every_n_layers"
FULL, LOCAL = "full_attention", "sliding_attention"
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
        attention, attention_norm: what the attention writes with, and the norm that reads the
            stream behind it.
        reader, activation, writer: of the MLP.
        spaces: blocks of the reader's rows, one beside the other: what the activation reads
            (`gate`), and what its answer is multiplied by (`up`).
        norm: behind the MLP; "" where what it writes leaves the layer as it is.
        width, depth, stream, heads: words of config.json.
        wide: why the width of the stream stays; "" where it can change.
        counts_from_padding: whether the first position is the one behind the id of padding.
        alternates: whether config.json says which layers see all of the text.
        segments: how many kinds of token_type_ids there are where config.json does not say;
            None: they are not read.
        refuses: words of config.json, and why a model that sets them is not narrowed.
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
    stream: str = "hidden_size"
    heads: str = "num_attention_heads"
    wide: str = ""
    spaces: tuple[str, ...] = ("gate",)
    counts_from_padding: bool = False
    alternates: bool = False
    segments: int | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Words of config.json that say how large it is."""
        named = (self.width, self.depth, self.stream, self.heads)
        return (*named, *((TYPES, PERIOD) if self.alternates else ()))


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
    "dim",
    "n_heads",
)
MODERN = Kind(
    "ModernBert",
    "layers",
    "attn.Wo",
    "mlp_norm",
    "mlp.Wi",
    "mlp.act",
    "mlp.Wo",
    norm="",
    spaces=("gate", "up"),
    alternates=True,
)
POSITIONS = "its tables of relative positions are read by the same matrices as the stream"
CONVOLUTION = "a convolution adds to its first layer, and text is passed through layers alone"
KINDS = {
    "bert": Kind("Bert", segments=2),
    "roberta": Kind("Roberta", counts_from_padding=True),
    "xlm-roberta": Kind("XLMRoberta", counts_from_padding=True),
    "distilbert": DISTIL,
    "modernbert": MODERN,
    "deberta-v2": Kind(
        "DebertaV2", wide=POSITIONS, segments=0, refuses={"conv_kernel_size": CONVOLUTION}
    ),
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
        found = next(entry["path"] for entry in said if module_kind(entry) == "Transformer")
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{file} names no Transformer; expected sentence-transformers' list of modules: take a "
            "fresh copy"
        ) from error
    home: Path = folder / found
    if not home.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{file} names {found}, which lies outside of {folder}")
    return home


def module_kind(entry: Mapping[str, Any]) -> str:
    """What an entry of modules.json is, without where its class lies."""
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
    for word, reason in found.refuses.items():
        if config.get(word):
            raise UnsupportedModelError(f"config.json sets {word}: {reason}")
    return found


def of_layers(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """What config.json says once these layers alone stay.

    What sees which text is said twice, for releases of transformers that read the list and for
    those that read the period; where there is none, these fail instead of reading another model.
    """
    kind = kind_of(config)
    words: dict[str, Any] = {kind.depth: len(kept)}
    if kind.alternates:
        types = layer_types(config)
        words[TYPES] = [types[number] for number in kept]
        words[PERIOD] = period(words[TYPES])
    return words


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Which layers of ModernBERT see all of the text, and which see what is near.

    Raises:
        CheckpointError: a list of another length than there are layers.
    """
    depth, every = int(config.get("num_hidden_layers", 22)), config.get(PERIOD) or 3
    types = config.get(TYPES) or [LOCAL if n % every else FULL for n in range(depth)]
    if len(types) != depth:
        raise CheckpointError(
            f"config.json has {len(types)} {TYPES} and {depth} layers; take the config.json that "
            "belongs to these weights"
        )
    return list(types)


def period(types: Sequence[str]) -> int | None:
    """The n with which every n-th layer, from the first on, and no other sees all of the text.

    >>> period([FULL, LOCAL, LOCAL, FULL]), period([FULL, LOCAL, FULL, FULL])
    (3, None)
    """
    for every in range(1, len(types) + 1):
        if all((kind == FULL) == (n % every == 0) for n, kind in enumerate(types)):
            return every
    return None


def outputs_of(name: str) -> tuple[str, ...]:
    """What a stock class of this name answers with."""
    return next(outputs for end, outputs in OUTPUTS.items() if name.endswith(end))


def reads_segments(config: Mapping[str, Any]) -> bool:
    """Whether token_type_ids are read."""
    kinds = kind_of(config).segments
    return kinds is not None and int(config.get("type_vocab_size", kinds)) > 0


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
