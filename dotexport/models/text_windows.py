"""Text to token windows: what the model reads while it is narrowed, and while it is judged.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dotexport.errors import CalibrationError, CheckpointError, UsageError
from dotexport.models.documents import documents
from dotexport.models.text_options import SELF, TextOptions, parts_of

logger = logging.getLogger(__name__)

# A cut changes the tokens in front of it, and an end token may follow: these many are not believed.
DOUBTFUL = 256
# Characters to begin with, for each token that is wanted: more than text has, as a rule.
CHARACTERS = 8
APART = 16  # one window in so many, at most, where windows are of all of a text
RENAMED = "TokenizersBackend"  # transformers 5 for PreTrainedTokenizerFast


def token_windows(model: Path, options: TextOptions) -> torch.Tensor:
    """Encode documents one by one, join them, cut into windows_NL (int64) without overlap.

    Each document keeps the start token its tokenizer gives it. Of a mix, each part is cut by
    itself, and every beginning of the windows holds the shares of the weights. Fewer than
    `samples` windows are fine; not one is an error. `skip` counts windows that would be taken.

    Raises:
        CalibrationError: no text, or less than one window of it.
        CheckpointError: the model folder has no usable tokenizer.
    """
    seqlen = window_length(model, options)
    vocabulary = _declared(model, "vocab_size", 1 << 62)
    encode = _encoder(model)
    parts = parts_of(options.source)
    order, found = _mixed(
        [part.weight for part in parts],
        options.skip + options.samples,
        lambda number, count: _cut(parts[number].source, options, encode, count, seqlen),
    )
    if len(order) <= options.skip:
        raise CalibrationError(
            f"{options.source} gives {len(order)} windows of {seqlen} tokens, and not one after "
            f"{options.skip} skipped ones; give more text or a smaller --seqlen"
        )
    kept = np.stack([found[number][place] for number, place in order[options.skip :]])
    if kept.max() >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of {model} gives the token {kept.max()}, beyond the model's vocabulary "
            f"of {vocabulary}; it belongs to another model"
        )
    return torch.from_numpy(kept)


def spread(model: Path, options: TextOptions, count: int) -> TextOptions:
    """The same with `every` said: as far apart as lets `count` windows be of all of the text, or of
    APART times as much of it as they are.

    A text's first windows are of few articles, chapters or files. What is fitted on these is worse
    on the others than it looks, by windows held out between them as well (docs/log.md).

    Raises:
        CalibrationError, CheckpointError, UsageError: as `token_windows`.
    """
    if options.every is not None:
        return options
    parts, wanted = parts_of(options.source), options.skip + count
    taken = order_of([part.weight for part in parts], [wanted] * len(parts), wanted)
    encode, seqlen = _encoder(model), window_length(model, options)
    apart = [1 if all(part.source == SELF for part in parts) else APART]
    for number, part in enumerate(parts):
        share = sum(of == number for of, _ in taken)
        if share and part.source != SELF:
            found = _cut(part.source, options, encode, share * APART, seqlen)
            apart.append(max(1, len(found) // share))
    return replace(options, every=min(apart))


Windows = NDArray[np.int64]


def _cut(
    source: str,
    options: TextOptions,
    encode: Callable[[str], list[int]],
    count: int,
    seqlen: int,
) -> Windows:
    """The first windows of one source, one in `every`, `count` if it has so many."""
    every = 1 if source == SELF else options.every or 1
    wanted = count * every * seqlen
    ids: list[int] = []
    for document in documents(source, options.own):
        ids += encode_start(document, wanted - len(ids), encode)
        if len(ids) >= wanted:
            break
    if not ids:
        raise CalibrationError(f"{source} holds no text; expected documents to read, in UTF-8")
    if len(ids) < seqlen:
        raise CalibrationError(
            f"{source} gives {len(ids)} tokens, which is less than one window of {seqlen}; "
            "give more text or a smaller --seqlen"
        )
    read = min(count * every, len(ids) // seqlen)
    return np.asarray(ids[: read * seqlen], dtype=np.int64).reshape(read, seqlen)[::every]


def _mixed(
    weights: Sequence[float], wanted: int, cut: Callable[[int, int], Windows]
) -> tuple[list[tuple[int, int]], list[Windows]]:
    """Windows in their order, each as (part, its place in it), and those of every part.

    Args:
        cut: the first windows of a part, as many as asked for or all that it has.
    """
    found: list[Windows] = [np.empty((0, 0), dtype=np.int64) for _ in weights]
    limits = [wanted] * len(weights)
    while True:
        order = order_of(weights, limits, wanted)
        needed = [sum(part == number for part, _ in order) for number in range(len(weights))]
        short = [n for n, windows_NL in enumerate(found) if len(windows_NL) < needed[n]]
        if not short:
            return order, found
        for number in short:
            found[number] = cut(number, needed[number])
            if len(found[number]) < needed[number]:
                limits[number] = len(found[number])
                if len(weights) > 1:
                    logger.warning(
                        "part %d of the mixed text has %d windows, fewer than its share of %d; the "
                        "others take its place",
                        *(number + 1, limits[number], needed[number]),
                    )


def order_of(weights: Sequence[float], limits: Sequence[int], wanted: int) -> list[tuple[int, int]]:
    """Next is always the part that is furthest behind its share, as long as it has windows.

    >>> order_of([3, 1], [9, 9], 5)
    [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3)]
    """
    taken = [0] * len(weights)
    order: list[tuple[int, int]] = []
    while len(order) < wanted:
        left = [n for n, limit in enumerate(limits) if taken[n] < limit]
        if not left:
            break
        number = min(left, key=lambda n: (taken[n] + 1) / weights[n])
        order.append((number, taken[number]))
        taken[number] += 1
    return order


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
