"""The tokenizer inside a GGUF file: llama.cpp's own two kinds of BPE, from tokenizer.json.

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

if TYPE_CHECKING:
    from dotexport.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Which of llama.cpp's pre-tokenizers a tokenizer.json means, by what only its pattern has.
SPLITTERS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
}
SPACE = "\u2581"
BYTES = {f"<0x{number:02X}>" for number in range(256)}

Merges = list[tuple[str, str]]


def tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    stored = _stored(checkpoint)
    added = [entry["id"] for entry in stored.get("added_tokens", [])]
    num_tokens = 1 + max([*stored["model"]["vocab"].values(), *added]) if stored else 0
    size = checkpoint.config.get("vocab_size") or 0
    if num_tokens <= size:
        return []
    return [
        f"tokenizer.json has {num_tokens} tokens where vocab_size is {size}, and llama.cpp needs a "
        "row for each; take the tokenizer that belongs to the model"
    ]


def add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    stored = _stored(checkpoint)
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
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(stored["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(stored))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, checkpoint.config)
    writer.add_add_bos_token(_adds_start(stored.get("post_processor")))


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer.json, if it is of a kind that is written here."""
    file = checkpoint.folder / "tokenizer.json"
    stored: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
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


def _splitter(pre_tokenizer: Any) -> str:
    """llama.cpp's name for a pre-tokenizer; ByteLevel alone is GPT-2's."""
    patterns = [
        part["pattern"].get("Regex", "")
        for part in pre_tokenizer.get("pretokenizers", [])
        if part.get("type") == "Split"
    ]
    if not patterns:
        return "gpt-2"
    for name, start in SPLITTERS.items():
        if patterns[0].startswith(start):
            return name
    logger.warning("llama.cpp may split text otherwise: its name for %r is unknown", patterns[0])
    return "default"


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


def _add_special(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        number = config.get(name)
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            add(number)


def _adds_start(post_processor: Any) -> bool:
    """Whether every text is to begin with the start token."""
    return "SpecialToken" in json.dumps((post_processor or {}).get("single"))
