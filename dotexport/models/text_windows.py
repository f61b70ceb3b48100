"""Text to token windows: what the model reads while it is narrowed, and while it is judged.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dotexport.errors import CalibrationError, CheckpointError, UsageError
from dotexport.models.documents import documents
from dotexport.models.text_options import TextOptions

# A cut changes the tokens in front of it, and an end token may follow: these many are not believed.
DOUBTFUL = 256
# Characters to begin with, for each token that is wanted: more than text has, as a rule.
CHARACTERS = 8
RENAMED = "TokenizersBackend"  # transformers 5 for PreTrainedTokenizerFast


def token_windows(model: Path, options: TextOptions) -> torch.Tensor:
    """Encode documents one by one, join them, cut into windows_NL (int64) without overlap.

    Each document keeps the start token its tokenizer gives it. Fewer than `samples` windows are
    fine; not one is an error.

    Raises:
        CalibrationError: no text, or less than one window of it.
        CheckpointError: the model folder has no usable tokenizer.
    """
    seqlen = window_length(model, options)
    vocabulary = _declared(model, "vocab_size", 1 << 62)
    encode = _encoder(model)
    wanted = (options.skip + options.samples) * seqlen
    ids: list[int] = []
    for document in documents(options.source):
        ids += encode_start(document, wanted - len(ids), encode)
        if len(ids) >= wanted:
            break
    if not ids:
        raise CalibrationError(
            f"{options.source} holds no text; expected documents to read, in UTF-8"
        )
    count = len(ids) // seqlen
    if count <= options.skip:
        raise CalibrationError(
            f"{options.source} gives {len(ids)} tokens, which is less than one window of {seqlen}"
            + (f" after {options.skip} skipped ones" if options.skip else "")
            + "; give more text or a smaller --seqlen"
        )
    if max(ids) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {model} gives the token {max(ids)}, beyond the model's vocabulary "
            f"of {vocabulary}; it belongs to another model"
        )
    kept = np.asarray(ids[: count * seqlen], dtype=np.int64).reshape(count, -1)
    return torch.from_numpy(kept[options.skip : options.skip + options.samples].copy())


def encode_start(document: str, wanted: int, encode: Callable[[str], list[int]]) -> list[int]:
    """At least the first `wanted` tokens of a document, as it has them as a whole.

    No more of it is encoded than that takes: one may be a whole corpus.
    """
    size = CHARACTERS * (wanted + DOUBTFUL)
    while size < len(document):
        ids = encode(document[:size])[:-DOUBTFUL]
        if len(ids) >= wanted:
            return ids
        size *= 2
    return encode(document)


def window_length(model: Path, options: TextOptions) -> int:
    """Tokens per window of this model.

    Raises:
        UsageError: more than its context was asked for.
    """
    context = _declared(model, "max_position_embeddings", 2048)
    if options.seqlen is not None and options.seqlen > context:
        raise UsageError(
            f"--seqlen {options.seqlen} exceeds the model's context of {context} tokens; "
            "give at most that"
        )
    return options.seqlen or min(2048, context)


def _declared(model: Path, key: str, default: int) -> int:
    from dotexport.models.checkpoint import read_config

    value = read_config(model).get(key) or default
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{model / 'config.json'} gives {key} = {value!r}; expected a positive integer"
        )
    return value


def _tokenizer(model: Path) -> Any:
    """Release 5 of transformers gave a class a new name, which older ones do not know."""
    import transformers

    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    file = model / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if said.get("tokenizer_class") == RENAMED and not hasattr(transformers, RENAMED):
        # It also lists extra tokens where older releases look for names; tokenizer.json has them.
        fast = transformers.PreTrainedTokenizerFast
        return fast.from_pretrained(model, extra_special_tokens={}, **here)
    return transformers.AutoTokenizer.from_pretrained(model, **here)


def read_tokenizer(model: Path) -> Any:
    """What transformers makes of a model folder; it cuts no text at the model's context.

    Raises:
        CheckpointError: there is none that it can load.
    """
    try:
        tokenizer = _tokenizer(model)
    except Exception as error:  # transformers and tokenizers raise whatever they stumble over
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{model} has no tokenizer that transformers can load "
            f"({type(error).__name__}: {reason}); expected the model's tokenizer.json and "
            "tokenizer_config.json beside config.json"
        ) from error
    # Longer than the context is meant: the windows are cut afterwards.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _encoder(model: Path) -> Callable[[str], list[int]]:
    tokenizer = read_tokenizer(model)
    return lambda text: list(tokenizer(text)["input_ids"])
