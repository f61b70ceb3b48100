"""What llama.cpp reads in the text side of a GGUF file, computed from the file alone.

Its two kinds of BPE, what it puts around a text, where it stops and the chat template; llamacpp.py
asks the library itself, where there is one, and tests hold the two against each other.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from dotexport.exports.nasty_texts import Conversation
from dotexport.exports.text_parity import TextSide, render
from dotexport.models.ggml.ggml_splitters import SPLITTERS, cutter

Kind = gguf.TokenType
SPACE = "\u2581"
# Tokens that are found in a text before anything else is done with it.
NAMED = {Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN}
# What it takes for ids that no file names, by kind of tokenizer.
UNNAMED = {"gpt2": (11, 11), "llama": (1, 2)}
# It stops at tokens of these texts in every model, and at those that name files or fill gaps.
ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
GAPS = {
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}
# Of ENDS, those that also every release since 2025-07 knows: a file need not name them.
KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>"),
}

Encode = Callable[[str], list[int]]


def read_text(file: Path, *, excuse: Callable[[str], str | None]) -> TextSide | None:
    """The text side of a file; None: it says that it holds no tokenizer."""
    fields = _Fields(gguf.GGUFReader(file))
    kind = fields("model")
    if kind not in UNNAMED:
        return None
    tokens = fields("tokens")
    start, end = (
        fields(f"{name}_token_id", UNNAMED[kind][i]) for i, name in enumerate(("bos", "eos"))
    )
    named = {end, *(fields(f"{name}_token_id") for name in ("eot", "eom"))}
    words = (
        _pieces_of_bytes(fields, tokens) if kind == "gpt2" else _pieces_of_letters(fields, tokens)
    )
    before = [start] if fields("add_bos_token", kind == "llama") else []
    after = [end] if fields("add_eos_token", False) else []
    return TextSide(
        encode=partial(_encode, words, _parted(fields, tokens), before, after),
        render=partial(_render, fields("chat_template"), tokens[start], tokens[end]),
        start=start,
        stops=frozenset(
            {n for n, token in enumerate(tokens) if token in KNOWN_ENDS} | named - {None}
        ),
        own_stops=frozenset(n for n, token in enumerate(tokens) if token in ENDS | GAPS),
        excuse=excuse,
    )


def excuses(tokenizer: Any) -> Callable[[str], str | None]:
    """Why llama.cpp cannot have the tokens of a text whatever stands in a file; None: it can."""
    backend = tokenizer.backend_tokenizer
    added = list(tokenizer.added_tokens_decoder.values())
    named = [str(token) for token in added]
    greedy = [str(token) for token in added if token.lstrip or token.rstrip or token.single_word]
    scheme = _prepend_scheme(json.loads(backend.to_str()))

    def excuse(text: str) -> str | None:
        parts = [text]
        for token in named:
            parts = [piece for part in parts for piece in part.split(token)]
        rest = "".join(parts)
        if rest == text and _normalised(backend, text) != _spaced(text):
            return "llama.cpp normalises no text"
        if rest and any(token in text for token in greedy):
            return "llama.cpp takes no spaces together with a token, and no token as a word alone"
        if rest and rest != text and scheme == "first":
            return "llama.cpp reads text behind a token as if a space stood before it"
        if scheme in ("first", "always") and any(
            part[:1] in (" ", SPACE) for part in parts if part
        ):
            return "llama.cpp puts a space also before text that begins with one"
        return None

    return excuse


def _prepend_scheme(stored: dict[str, Any]) -> str | None:
    """Where Metaspace puts a space: before the text ("first"), behind tokens too ("always")."""
    found = re.search('"prepend_scheme": "([a-z]+)"', json.dumps(stored.get("pre_tokenizer")))
    return found[1] if found else None


def _normalised(backend: Any, text: str) -> str:
    if backend.normalizer is None:
        return _spaced(text)
    return _spaced(backend.normalizer.normalize_str(text))


def _spaced(text: str) -> str:
    """Spaces as spaces, and no space in front, which some normalisers put there."""
    return text.replace(SPACE, " ").lstrip(" ")


def _render(template: str | None, start: str, end: str, conversation: Conversation) -> str | None:
    if template is None:
        return None
    return render(template, conversation, bos_token=start, eos_token=end)


class _Fields:
    """Values below tokenizer.ggml, and the chat template beside it."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self.reader = reader

    def __call__(self, name: str, default: Any = None) -> Any:
        name = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        known = self.reader.fields
        return known[name].contents() if name in known else default


Part = str | int
Words = Callable[[str, bool], list[int]]


def _encode(
    words: Words,
    parted: Callable[[str], list[Part]],
    before: Sequence[int],
    after: Sequence[int],
    text: str,
) -> list[int]:
    found, first = list(before), True
    for part in parted(text):
        if isinstance(part, int):
            found.append(part)
        else:
            found += words(part, first)
        first = isinstance(part, int)
    return [*found, *after]


def _parted(fields: _Fields, tokens: Sequence[str]) -> Callable[[str], list[Part]]:
    """Cuts a text at the tokens that it names, the longest of them first."""
    kinds = fields("token_type")
    named = [n for n, kind in enumerate(kinds) if kind in NAMED or tokens[n] in ENDS | GAPS]
    named.sort(key=lambda n: -len(tokens[n].encode()))

    def cut(text: str) -> list[Part]:
        parts: list[Part] = [text] if text else []
        for number in named:
            parts = [piece for part in parts for piece in _cut_at(part, tokens[number], number)]
        return parts

    return cut


def _cut_at(part: Part, token: str, number: int) -> Iterator[Part]:
    if isinstance(part, int) or token not in part:
        yield part
        return
    for place, piece in enumerate(part.split(token)):
        if place:
            yield number
        if piece:
            yield piece


def _pieces_of_bytes(fields: _Fields, tokens: Sequence[str]) -> Words:
    """BPE over bytes, after a pre-tokenizer."""
    from tokenizers import Tokenizer, models

    name = fields("pre")
    merges = [tuple(merge.split(" ", 1)) for merge in fields("merges")]
    whole = SPLITTERS[name].whole_words
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = cutter(name)
    return lambda text, first: list(tokenizer.encode(text).ids)


def _pieces_of_letters(fields: _Fields, tokens: Sequence[str]) -> Words:
    """BPE over characters as SentencePiece has it: any two neighbours that spell a token are
    joined, those with the best score first, and what is no token is spelled in bytes."""
    numbers = {token: number for number, token in enumerate(tokens)}
    scores = fields("scores")
    prefixed = fields("add_space_prefix", True)

    def words(text: str, first: bool) -> list[int]:
        whole = (" " if prefixed and first else "") + text
        pieces = _joined(list(whole.replace(" ", SPACE)), numbers, scores)
        return [number for piece in pieces for number in _numbers(piece, numbers)]

    return words


def _joined(pieces: list[str], numbers: dict[str, int], scores: Sequence[float]) -> Iterable[str]:
    after = [*range(1, len(pieces)), -1]
    before = list(range(-1, len(pieces) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            both = pieces[left] + pieces[right]
            if both in numbers:
                heapq.heappush(queue, (-scores[numbers[both]], left, right, both))

    for left in range(len(pieces) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, both = heapq.heappop(queue)
        if after[left] != right or not pieces[left] or pieces[left] + pieces[right] != both:
            continue  # one of the two has been joined to something else since
        pieces[left], pieces[right] = both, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return filter(None, pieces)


def _numbers(piece: str, numbers: dict[str, int]) -> list[int]:
    if piece in numbers:
        return [numbers[piece]]
    return [numbers[f"<0x{byte:02X}>"] for byte in piece.encode()]
