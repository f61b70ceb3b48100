"""Which tokens text uses: counts over documents, and what a chat template says.

Shapes: R rows of the original's table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from dotexport.vocabulary.expecting import Spread
from dotexport.vocabulary.keeping import Counts

logger = logging.getLogger(__name__)

PIECE = 1 << 20  # characters of a document that are encoded at once
AT_ONCE = 16  # pieces, over as many threads as the tokenizers package takes
MOST = 1 << 29  # characters that are counted: of an endless data set, its start

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where."}},
            "required": ["place"],
        },
        "return": {"type": "string", "description": "The weather."},
    },
}
CALL = {"name": "get_weather", "arguments": {"place": "Paris"}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "get_weather", "content": "sunny", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Sunny.", "reasoning_content": "It is sunny."},
    {"role": "user", "content": "Thanks."},
]
# Some templates take no tools, or no system role; of the others each says something.
TALKS = (TALK, TALK[1:], [TALK[0], TALK[1]], [TALK[1]], [TALK[1], TALK[4], TALK[5]])


def count(
    tokenizer: Any,
    documents: Iterable[str],
    rows: int,
    told: Callable[[int], None],
    spread: Spread | None = None,
) -> Counts:
    """How often each token occurs; `told` hears the characters that were read, `spread` the
    tokens."""
    counts_R = np.zeros(rows, dtype=np.int64)
    read = 0
    every = _pieces(documents)
    while pieces := list(islice(every, AT_ONCE)):
        for ids in tokenizer(pieces)["input_ids"]:
            known = np.asarray(ids, dtype=np.int64)
            known = known[known < rows]
            counts_R += np.bincount(known, minlength=rows)
            if spread is not None:
                spread.read(known.tolist())
        read += sum(map(len, pieces))
        told(read)
        if read >= MOST:
            logger.warning("tokens are counted in the first %d characters of the text", read)
            break
    return counts_R


def fingerprint(documents: Iterable[str]) -> str:
    """Digest of the text that `count` would read."""
    digest, read = hashlib.sha256(), 0
    for piece in _pieces(documents):
        digest.update(json.dumps(piece).encode())
        read += len(piece)
        if read >= MOST:
            break
    return digest.hexdigest()


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """Documents, long ones cut behind the ends of lines."""
    for document in documents:
        start = 0
        while len(document) - start > PIECE:
            end = document.rfind("\n", start, start + PIECE) + 1
            end = end if end > start else start + PIECE
            yield document[start:end]
            start = end
        yield document[start:]


def template_texts(tokenizer: Any) -> Iterator[str]:
    """What a chat template can say: its literals, whatever branch they stand in, and conversations
    with all roles and a tool."""
    templates = tokenizer.chat_template or {}
    named = templates if isinstance(templates, dict) else {None: templates}
    for name, template in named.items():
        yield from _literals(template)
        for talk in TALKS:
            for tools in (None, [TOOL]):
                for prompt in (False, True):
                    yield from _rendered(tokenizer, name, talk, tools, prompt)


def _literals(template: str) -> Iterator[str]:
    """Text between tags, and strings inside them; what a tag does is not asked."""
    from jinja2 import Environment

    for _, kind, value in Environment(trim_blocks=True, lstrip_blocks=True).lex(template):
        if kind == "data":
            yield value
        elif kind == "string":
            yield _unquoted(value)


def _unquoted(literal: str) -> str:
    try:
        return str(ast.literal_eval(re.sub(r"\r?\n", r"\\n", literal)))
    except (ValueError, SyntaxError):
        return literal[1:-1]


def _rendered(
    tokenizer: Any, name: str | None, talk: list[dict[str, Any]], tools: Any, prompt: bool
) -> Iterator[str]:
    chosen = {} if name is None else {"chat_template": name}
    try:
        yield tokenizer.apply_chat_template(
            talk, tools=tools, add_generation_prompt=prompt, tokenize=False, **chosen
        )
    except Exception as error:  # templates raise what they like where they take no such talk
        logger.debug("a chat template takes no such conversation: %s", error)
