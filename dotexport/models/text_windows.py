"""Text to token windows: what the model reads while it is narrowed, and while it is judged.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dotexport.errors import CalibrationError, CheckpointError, RuntimeMissingError, UsageError
from dotexport.models.text_options import TextOptions

EMBEDDED = "embedded:"
DOCUMENT_END = "<|endoftext|>"
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
        ids += encode(document)
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


def documents(source: str) -> Iterator[str]:
    """Non-empty documents of a source, stripped of surrounding white space.

    Raises:
        CalibrationError: the source does not exist or cannot be read as text.
    """
    for document in _raw_documents(source):
        if stripped := document.strip():
            yield stripped


def _raw_documents(source: str) -> Iterable[str]:
    if source.startswith(EMBEDDED):
        return _embedded(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return (part for file in sorted(path.rglob("*.txt")) for part in _split(_read(file)))
    if path.is_file():
        return _jsonl(path) if path.suffix == ".jsonl" else _split(_read(path))
    if path.suffix or source.startswith(("/", ".", "~")):
        raise CalibrationError(
            f"{source} does not exist; expected a .txt or .jsonl file, or a folder of .txt files"
        )
    return _dataset(source)


def _split(text: str) -> list[str]:
    return text.split(DOCUMENT_END)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error


def _jsonl(file: Path) -> Iterator[str]:
    # Not splitlines(): a JSON string may hold the line ends that only Unicode knows.
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(
                f'{file}, line {number} is not JSON ({error}); expected {{"text": "..."}}'
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(
                f'{file}, line {number} has no "text"; expected {{"text": "..."}} on every line'
            )
        yield row["text"]


def _embedded(source: str) -> list[str]:
    from dotexport import embedded

    parts = {
        f"{EMBEDDED}calibration": embedded.calibration_text,
        f"{EMBEDDED}evaluation": embedded.evaluation_text,
    }
    if source not in parts:
        raise CalibrationError(f"{source} is not known; expected one of {', '.join(parts)}")
    return list(parts[source]())


def _dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RuntimeMissingError(
            f"{name} is no file here; to read it as a dataset of the hub, `pip install datasets`"
        ) from error
    path, _, subset = name.partition(":")
    try:
        rows = load_dataset(path, subset or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{name} is no file here and cannot be read as a dataset of the hub "
            f"({type(error).__name__}: {error}); check the spelling and the network, or give a file"
        ) from error
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise CalibrationError(f'{name} has no "text" column; columns: {", ".join(row)}')
        yield row["text"]


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


def _encoder(model: Path) -> Any:
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
    return lambda text: tokenizer(text)["input_ids"]
