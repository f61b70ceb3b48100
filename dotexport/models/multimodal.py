"""Models that see or hear: the language model among their parts.

Their config.json has its words in `text_config`, and their files hold it under a name of its own,
beside towers that read pictures or sound and a projector into the stream. The language model is
read here as if it were alone; what lies around it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

from dotexport.errors import CheckpointError
from dotexport.models.families import SUPPORTED

# By model_type: those of which text alone is computed by the language model alone (Gemma 4 reads
# padding where text has a word for a picture and there is none).
MULTIMODAL = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llava",
    "mistral3",
    "qwen3_5",
    "qwen3_5_moe",
    "smolvlm",
)
HEAD = "lm_head."
TABLE = "embed_tokens.weight"
# How names begin in files, and how they do in the class of the language model alone.
STARTS = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", HEAD),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
)
INNER = "text_config"
TIED = "tie_word_embeddings"
# Words that the whole may say for it.
OF_THE_WHOLE = (
    "quantization_config",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
OF_ONE_ALONE = ("architectures", "auto_map", "transformers_version")
# What reads pictures and sound into numbers, beside the tokenizer.
PROCESSORS = ("*processor_config.json",)


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether config.json, as it is stored, is that of such a model."""
    return config.get("model_type") in MULTIMODAL and isinstance(config.get(INNER), Mapping)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the language model alone, with what its class takes for granted; any other
    config stays as it is, and so does one whose language model there is no table for, or whose
    class this transformers does not have.

    Raises:
        CheckpointError: the class refuses it.
    """
    if not is_multimodal(config):
        return config
    from transformers import CONFIG_MAPPING, AutoConfig

    if config["model_type"] not in CONFIG_MAPPING:
        return config
    try:
        stock = AutoConfig.for_model(**deepcopy(dict(config)))  # the class writes into it
        full = stock.get_text_config(decoder=True).to_dict()
    except Exception as error:  # whatever the class objects to is the answer
        raise CheckpointError(
            f"transformers refuses config.json of a {config['model_type']} "
            f"({type(error).__name__}: {error}); take the one that belongs to these weights"
        ) from error
    kind, inner = full.get("model_type"), config[INNER]
    named = [name for name, family in SUPPORTED.items() if family.model_type == kind]
    if not named:
        return config
    said = {key: value for key, value in full.items() if _is_said(key, inner)}
    outer = {key: config[key] for key in OF_THE_WHOLE if config.get(key) is not None}
    # The default of the whole is another one in some classes, and decides nothing: weights do.
    tied = next((of[TIED] for of in (config, inner) if of.get(TIED) is not None), full.get(TIED))
    return {
        **said,
        **{key: value for key, value in outer.items() if key not in inner},
        "model_type": kind,
        "architectures": named[:1],
        TIED: bool(tied),
    }


def joined_config(whole: Mapping[str, Any], language: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the whole, with this one in the place of its language model's."""
    words = {key: value for key, value in language.items() if key not in OF_ONE_ALONE}
    return {**whole, TIED: language[TIED], INNER: words}


def language_names(names: Iterable[str]) -> dict[str, str]:
    """Tensor of the language model alone -> its name in files; what lies around it has none."""
    stored = list(names)
    if not any(name.startswith(start) for name in stored for start, _ in STARTS):
        return {name: name for name in stored}
    owned = ((_alone(name), name) for name in stored)
    return {own: name for own, name in owned if own is not None}


def stored_name(own: str, table: str) -> str:
    """What files call a tensor of the language model, where they call its table of tokens so."""
    start = table.removesuffix(TABLE)
    if own.startswith("model."):
        return start + own.removeprefix("model.")
    return f"language_model.{own}" if start == "language_model.model." else own


def _alone(name: str) -> str | None:
    for start, own in STARTS:
        if name.startswith(start):
            return own + name.removeprefix(start)
    return name if name.startswith(HEAD) else None


def _is_said(key: str, inner: Mapping[str, Any]) -> bool:
    return not key.startswith("_") and (key in inner or key not in _common())


@cache
def _common() -> frozenset[str]:
    """Words that configs of all classes have: how a text is generated, what a session returns."""
    from transformers import PretrainedConfig

    return frozenset(PretrainedConfig().to_dict())
