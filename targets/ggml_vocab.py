"""The tokenizer inside a GGUF file: llama.cpp's own two kinds of BPE, from what transformers reads:
tokenizer.json, with what tokenizer_config.json adds to it and changes in it.

Byte-level BPE becomes `gpt2`, with its merges; BPE as SentencePiece trains it (spaces as ▁, bytes
as <0x..>) becomes `llama`, whose merges follow from a score for each token. For others the file
says that it holds none, and takes token ids.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gguf

from dotexport.exports.nasty_texts import TEXTS
from dotexport.exports.text_parity import (
    added_around,
    find_tokenizer,
    start_of,
    stops_of,
)
from dotexport.models.ggml.ggml_splitters import find_splitter

from .ggml_text import KNOWN_ENDS

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

SPACE = "\u2581"
BYTES = {f"<0x{number:02X}>" for number in range(256)}

# Keys of end tokens; llama.cpp stops at each.
END_SLOTS = ("eos", "eot", "eom")

Merges = list[tuple[str, str]]


def tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    return list(_problems(checkpoint))


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    tokenizer = find_tokenizer(checkpoint.folder)
    stored = _stored(tokenizer)
    if not stored:
        return
    added = [entry["id"] for entry in stored.get("added_tokens", [])]
    num_tokens = 1 + max([*stored["model"]["vocab"].values(), *added])
    size = checkpoint.config.get("vocab_size") or 0
    if num_tokens > size:
        yield (
            f"tokenizer.json has {num_tokens} tokens where vocab_size is {size}, and llama.cpp "
            "needs a row for each; take the tokenizer that belongs to the model"
        )
        return
    for where, tokens in zip(("before", "behind"), added_around(tokenizer), strict=True):
        if len(tokens) > 1:
            yield (
                f"the tokenizer puts {len(tokens)} tokens {where} every text, and llama.cpp one at "
                "most; change its post_processor, or export with another target"
            )
    if left := _ends(checkpoint, tokenizer)[len(END_SLOTS) :]:
        yield (
            f"generation_config.json names more end tokens than GGUF has places for; take "
            f"{', '.join(map(str, left))} out of its eos_token_id, or export with another target"
        )


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    tokenizer = find_tokenizer(checkpoint.folder)
    stored = _stored(tokenizer)
    if not stored:
        logger.warning(
            "the tokenizer of %s is no BPE that llama.cpp knows and is left out of the GGUF file",
            checkpoint.folder,
        )
        writer.add_tokenizer_model("none")
        return
    tokens, types = _tokens(stored, checkpoint.config["vocab_size"])
    merges: Merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair)
        for pair in stored["model"]["merges"]
    ]
    if _is_byte_level(stored):
        whole = bool(stored["model"].get("ignore_merges"))
        splitter = find_splitter(tokenizer.backend_tokenizer, TEXTS, whole_words=whole)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(stored))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, checkpoint, tokenizer)
    _add_templates(writer, tokenizer.chat_template)


def _stored(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json would say of it, if it is of a kind that is written here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    if stored.get("model", {}).get("type") != "BPE":
        return {}
    if _is_byte_level(stored):
        return stored if stored["model"]["merges"] else {}  # llama.cpp insists on some
    return stored if _has_byte_tokens(stored) else {}


def _is_byte_level(stored: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps(stored.get("pre_tokenizer"))


def _has_byte_tokens(stored: Mapping[str, Any]) -> bool:
    """As SentencePiece has: what no token spells is spelled in bytes."""
    return bool(stored["model"].get("byte_fallback")) and set(stored["model"]["vocab"]) >= BYTES


def _tokens(stored: Mapping[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Every id of the table, those that no text reaches included."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    spelled = set() if _is_byte_level(stored) else BYTES
    for token, number in stored["model"]["vocab"].items():
        tokens[number] = token
        types[number] = gguf.TokenType.BYTE if token in spelled else gguf.TokenType.NORMAL
    for entry in stored.get("added_tokens", []):
        special = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], special
    unknown = stored["model"]["vocab"].get(stored["model"].get("unk_token"))
    if unknown is not None and not _is_byte_level(stored):
        types[unknown] = gguf.TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: Sequence[str], merges: Merges) -> list[float]:
    """The earlier a merge makes a token, the higher it scores: llama.cpp joins any two neighbours
    that spell a token, the best first."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    if any(_joined_otherwise(first, merges)):
        logger.warning(
            "llama.cpp may split text otherwise: it joins any two tokens that spell a third, and "
            "tokenizer.json only some of them"
        )
    return [-float(first[token]) if token in first else -1e6 for token in tokens]


def _joined_otherwise(first: Mapping[str, int], merges: Merges) -> Iterator[bool]:
    """Pairs that spell a token and have no merge, and merges out of the order of their tokens."""
    parts = {part for pair in merges for part in pair} | set(first)
    known = set(merges)
    for token in first:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        yield any(a in parts and b in parts and (a, b) not in known for a, b in splits)
    ranks = [first[left + right] for left, right in merges]
    yield ranks != sorted(ranks)


def _prepends(stored: Mapping[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    steps = json.dumps([stored.get("normalizer"), stored.get("pre_tokenizer")], ensure_ascii=False)
    return f'"prepend": "{SPACE}"' in steps or any(
        f'"prepend_scheme": "{scheme}"' in steps for scheme in ("first", "always")
    )


def _add_special(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: Any) -> None:
    """The start, the ends, the padding, and what is put around every text.

    llama.cpp takes numbers of its own for a start and an end that are not named.
    """
    size = checkpoint.config["vocab_size"]
    before, after = added_around(tokenizer)
    for slot, number in zip(END_SLOTS, _ends(checkpoint, tokenizer), strict=False):
        getattr(writer, f"add_{slot}_token_id")(number)
    start, padding = start_of(checkpoint.folder, tokenizer), checkpoint.config.get("pad_token_id")
    if start is not None and start < size:
        writer.add_bos_token_id(start)
    if isinstance(padding, int) and 0 <= padding < size:
        writer.add_pad_token_id(padding)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _ends(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """End tokens, in the order in which they take places.

    The first is what `add_eos_token` appends and what chat templates call eos_token. Of the others
    those come first that llama.cpp does not know by their text.
    """
    size = checkpoint.config["vocab_size"]
    stops = [number for number in stops_of(checkpoint.folder) if number < size]
    own = tokenizer.eos_token_id
    known = {n for n in (*stops, own) if n is not None and _text(tokenizer, n) in KNOWN_ENDS}
    _, after = added_around(tokenizer)
    first = [*after, *([own] if own in stops or own in known else []), *stops]
    if not first:
        return [own] if own is not None and own < size else []
    others = [number for number in stops if number != first[0]]
    unknown = [number for number in others if number not in known]
    room = max(0, len(END_SLOTS) - 1 - len(unknown))
    return [first[0], *unknown, *[number for number in others if number in known][:room]]


def _text(tokenizer: Any, number: int) -> str | None:
    text: str | None = tokenizer.convert_ids_to_tokens(number)
    return text


def _add_templates(writer: gguf.GGUFWriter, templates: Any) -> None:
    if isinstance(templates, Mapping):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates:
        writer.add_chat_template(templates)
