"""The tokenizer of a GGUF file, rebuilt as tokenizer.json and tokenizer_config.json.

Two kinds are read, llama.cpp's `gpt2` (BPE over bytes, cut into words by a pattern that the file
names) and `llama` (SentencePiece's BPE, whose merges follow from scores). Where transformers'
reader and llama.cpp differ, the model that a file was made from decides, and this follows it: words
are cut as the named pattern cuts them (that reader knows fewer names, and `smollm`, which cuts
digits one by one, is not among them), tokens that the file marks stay whole whatever letters
they are of, and SentencePiece puts a space also before text that begins with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from dotexport.errors import CheckpointError, DotexportError, UnsupportedModelError
from dotexport.models.ggml.ggml_file import GgufFile
from dotexport.models.ggml.ggml_splitters import SPLITTERS, find_alias, stock_cutter
from dotexport.storage.files import write_json

Kind = gguf.TokenType
SPACE = "\u2581"
ADDED = {Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN}
# Ids that llama.cpp takes where a file names none, and the keys that name them.
DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}
SLOTS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ENDS = ("eos", "eot", "eom")
TEMPLATE = "tokenizer.chat_template"


def write_tokenizer(file: GgufFile, folder: Path, *, rows: int, context: int) -> dict[str, Any]:
    """Write the tokenizer, and return the ids that config.json and generation_config.json say.

    Args:
        rows: of the embedding.

    Raises:
        UnsupportedModelError: a kind of tokenizer, or a pattern, that is not rebuilt here.
        CheckpointError: its parts do not belong together.
    """
    kind = file.field("tokenizer.ggml.model")
    if kind not in DEFAULTS:
        raise UnsupportedModelError(
            f"{file.path} has a tokenizer of kind {kind!r}, which cannot be rebuilt; expected one "
            f"of {', '.join(DEFAULTS)}: give the model folder that the file was made from"
        )
    tokens, kinds = _tokens(file, rows)
    ids = {name: _special_id(file, name, kind, len(tokens)) for name in {*SLOTS, *ENDS}}
    try:
        tokenizer = (_of_bytes if kind == "gpt2" else _of_letters)(file, tokens, kinds, ids)
    except DotexportError:
        raise
    except Exception as error:  # the tokenizers package has no class of its own for what it refuses
        raise CheckpointError(
            f"the tokenizer of {file.path} contradicts itself ({error}); take an undamaged copy"
        ) from error
    named = {number for number in ids.values() if number is not None}
    _add(tokenizer, tokens, kinds, named)
    tokenizer.post_processor = _around(file, tokens, ids, kind)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", _config(file, tokens, ids, context))
    return {
        f"{slot}_token_id": ids[name]
        for slot, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if ids[name] is not None
    }


def ends_of(file: GgufFile, size: int) -> list[int]:
    """Tokens that end a generation, that of a text first."""
    kind = file.field("tokenizer.ggml.model")
    ends = (_special_id(file, name, kind, size) for name in ENDS)
    return list(dict.fromkeys(number for number in ends if number is not None))


def _special_id(file: GgufFile, name: str, kind: str, size: int) -> int | None:
    number = file.field(f"tokenizer.ggml.{name}_token_id", DEFAULTS[kind].get(name))
    if number is None or number == 0xFFFFFFFF:  # what llama.cpp writes for none
        return None
    if not 0 <= number < size:
        raise CheckpointError(
            f"{file.path} gives {name}_token_id = {number}, and has {size} tokens; take an "
            "undamaged copy"
        )
    return int(number)


def _tokens(file: GgufFile, rows: int) -> tuple[list[str], list[int]]:
    tokens: list[str] = file.field("tokenizer.ggml.tokens", [])
    kinds: list[int] = file.field("tokenizer.ggml.token_type", [Kind.NORMAL] * len(tokens))
    if not tokens or len(tokens) > rows or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, {len(kinds)} kinds of them and {rows} rows of "
            "the embedding, where each token has one of both; take an undamaged copy"
        )
    return tokens, kinds


def _vocabulary(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Token -> id; rows that only fill the table are no tokens."""
    found: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if not (kind == Kind.UNUSED and token == f"[PAD{number}]"):
            found.setdefault(token, number)
    return found


def _of_bytes(
    file: GgufFile, tokens: Sequence[str], kinds: Sequence[int], ids: Mapping[str, int | None]
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = _pattern(file)
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges", [])]
    whole = SPLITTERS[pre].whole_words
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens, kinds), merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = stock_cutter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if file.architecture.startswith("qwen"):  # no file says it, and llama.cpp leaves it out
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pattern(file: GgufFile) -> str:
    name = file.field("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedModelError(
            f"{file.path} does not say how its tokenizer cuts text into words "
            "(tokenizer.ggml.pre), as files did until April 2024; convert the model again"
        )
    if (known := find_alias(name)) is None:
        raise UnsupportedModelError(
            f"{file.path} cuts text as llama.cpp's {name!r} does, which is not known here; give "
            "the model folder that the file was made from"
        )
    return known


def _of_letters(
    file: GgufFile, tokens: Sequence[str], kinds: Sequence[int], ids: Mapping[str, int | None]
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: list[float] = file.field("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens and {len(scores)} scores of them; take an "
            "undamaged copy"
        )
    vocab = _vocabulary(tokens, kinds)
    prefixed = file.field("tokenizer.ggml.add_space_prefix", True)
    unknown = ids["unknown"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            list(_merges(vocab, kinds, scores)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaced]) if prefixed else spaced
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])]
    )
    return tokenizer


def _merges(
    vocab: Mapping[str, int], kinds: Sequence[int], scores: Sequence[float]
) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that spells a third, the best of these first."""
    words = {token: number for token, number in vocab.items() if kinds[number] == Kind.NORMAL}
    for token in sorted(words, key=lambda token: (-scores[words[token]], words[token])):
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in words and pair[1] in words]
        yield from sorted(known, key=lambda pair: (words[pair[0]], words[pair[1]]))


def _add(tokenizer: Any, tokens: Sequence[str], kinds: Iterable[int], named: Iterable[int]) -> None:
    """Tokens that text names, found before it is cut."""
    from tokenizers import AddedToken

    special = {n for n, kind in enumerate(kinds) if kind in ADDED} | set(named)
    plain = {n for n, kind in enumerate(kinds) if kind == Kind.USER_DEFINED} - set(named)
    for number in sorted(special):
        found = AddedToken(tokens[number], normalized=False, special=number not in plain)
        (tokenizer.add_tokens if number in plain else tokenizer.add_special_tokens)([found])


def _around(file: GgufFile, tokens: Sequence[str], ids: Mapping[str, int | None], kind: str) -> Any:
    """What every text begins and ends with."""
    from tokenizers import processors

    starts = kind == "llama" or SPLITTERS[_pattern(file)].whole_words  # as llama.cpp has it
    put = {
        "bos": file.field("tokenizer.ggml.add_bos_token", starts),
        "eos": file.field("tokenizer.ggml.add_eos_token", False),
    }
    marks = {
        name: (tokens[number], number)
        for name, yes in put.items()
        if yes and (number := ids[name]) is not None
    }

    def around(text: str, segment: int) -> list[str]:
        at = {name: [f"{token}:{segment}"] for name, (token, _) in marks.items()}
        return [*at.get("bos", []), f"{text}:{segment}", *at.get("eos", [])]

    return processors.TemplateProcessing(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=list(dict(marks.values()).items()),
    )


def _config(
    file: GgufFile, tokens: Sequence[str], ids: Mapping[str, int | None], context: int
) -> dict[str, Any]:
    named = {
        slot: tokens[number] for name, slot in SLOTS.items() if (number := ids[name]) is not None
    }
    templates = _templates(file)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **named,
        **({"chat_template": templates} if templates else {}),
    }


def _templates(file: GgufFile) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them under their names."""
    default: str | None = file.field(TEMPLATE)
    names: list[str] = file.field("tokenizer.chat_templates", [])
    others = {name: file.field(f"{TEMPLATE}.{name}") for name in names}
    if not any(others.values()):
        return default
    every = {"default": default, **others}
    return [{"name": name, "template": text} for name, text in every.items() if text]
