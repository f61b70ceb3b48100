"""What a text begins with that a model is to go on with: a start token, a word, a few words, or a
chat template.

A script is given tokens and gaps by turns: what is sampled stands behind each piece, up to a token
that ends texts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotexport.exports.text_parity import added_around, start_of, stops_of
from dotexport.models.text_windows import read_tokenizer

logger = logging.getLogger(__name__)

PLACE = "Zq0place0qZ"  # where a message stands in a rendered template
CHAT, START, WORD, SEED = "chat", "start", "word", "seed"
# Prose, talk, code, lists, other languages: what a text may turn out to be.
SEEDS = (
    *("The", "In the year", "It was", "When I was", "Once upon a time", "According to", "How to"),
    *("A study of", "Dear", '"', "1.", "# ", "Question:", "Chapter 1", "def ", "import ", "<p>"),
    *("We show that", "Ingredients:", "The city of", "Why", "Der", "Le", "El", "В", "我"),
)


@dataclass(frozen=True)
class Script:
    """One text to be: pieces that are given, each followed by what the model says."""

    kind: str
    pieces: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Starts:
    """What texts of one model begin and end with.

    Attributes:
        before: tokens that its tokenizer puts before every text.
        start: the start token, where a text may consist of it so far; None: there is none.
        words: tokens that can be the first of a text.
        chat: pieces around the user's message, by the model's template; None: it has none.
        ends: tokens that end a turn or a text.
    """

    tokenizer: Any
    before: tuple[int, ...]
    start: int | None
    words: tuple[int, ...]
    chat: tuple[tuple[int, ...], ...] | None
    ends: frozenset[int]

    @classmethod
    def of(cls, folder: Path) -> Starts:
        """Read the tokenizer, its template, and the tokens that config files name.

        Raises:
            CheckpointError: no tokenizer that transformers can load.
        """
        tokenizer = read_tokenizer(folder)
        before = tuple(added_around(tokenizer)[0])
        chat = chat_pieces(tokenizer)
        # A start token that only the template uses begins a conversation, and no text.
        start = start_of(folder, tokenizer) if before or chat is None else None
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        special = {number for number, token in added if getattr(token, "special", False)}
        special |= {*tokenizer.all_special_ids, *stops_of(folder)}
        words = (n for n in range(len(tokenizer)) if n not in special)
        return cls(tokenizer, before, start, tuple(words), chat, frozenset(special))

    def scripts(self, random: np.random.Generator) -> Iterator[Script]:
        """Without end: conversations, where there is a template, and plain texts by turns."""
        chatting = bool(random.integers(2))
        while True:
            if self.chat is not None and chatting:
                yield Script(CHAT, self.chat)
            else:
                yield self._plain(random)
            chatting = not chatting

    def _plain(self, random: np.random.Generator) -> Script:
        kinds = [WORD, SEED] if self.start is None else [START, WORD, SEED]
        kind = kinds[random.integers(len(kinds))]
        if kind == START and self.start is not None:
            return Script(kind, (self.before or (self.start,),))
        seed = SEEDS[random.integers(len(SEEDS))]
        ids = self.tokenizer(seed, add_special_tokens=False)["input_ids"]
        if kind == WORD or not ids:  # a small vocabulary may spell no seed
            kind, ids = WORD, [self._word(random)]
        return Script(kind, ((*self.before, *ids),))

    def _word(self, random: np.random.Generator) -> int:
        """A token that is whole characters by itself, if one is found soon."""
        word = 0
        for _ in range(20):
            word = self.words[random.integers(len(self.words))]
            text = self.tokenizer.decode([word])
            if text.strip() and "\ufffd" not in text:
                break
        return word

    def text(self, ids: list[int]) -> str:
        """What the tokenizer reads as these tokens, or as fewer for the same text."""
        count = len(self.before)
        if count and tuple(ids[:count]) == self.before:
            ids = ids[count:]
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text).strip("\ufffd").strip()


def chat_pieces(tokenizer: Any) -> tuple[tuple[int, ...], ...] | None:
    """Tokens before the user's message, and those between it and the answer; None: no template
    that takes a conversation."""
    if not tokenizer.chat_template:
        return None
    message = [{"role": "user", "content": PLACE}]
    try:
        rendered = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates raise what they like
        logger.warning("the chat template takes no conversation, so none is sampled: %s", error)
        return None
    pieces = rendered.split(PLACE)
    if len(pieces) != 2:
        logger.warning("the chat template repeats or drops the message, so no chat is sampled")
        return None
    found = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return tuple(map(tuple, found)) if all(found) else None
