"""Whether a model still speaks: what it goes on with, beside what the original does.

Perplexity judges one token at a time behind text that others wrote; a model that has lost a little
of everything may still repeat itself as soon as it reads its own words.

Shapes: B prompts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dotexport.exports.target import Session
from dotexport.generation.starts import Starts

ORIGINAL = "original"  # the model that the others are judged by
PLAIN, CHAT = "plain", "chat"
BEGINNING = 16  # tokens of a plain prompt
GRAM = 4  # tokens whose second appearance is a repetition
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
# A loop: the last tokens are one piece of up to so many, said at least so often.
LONGEST_LOOP, TURNS, SHORTEST = 20, 3, 12
# What is said in words: at least so many of all, and so many more than the original's.
MANY, MORE = 0.5, 0.25

QUESTIONS = (
    "What is a volcano?",
    "Write a short story about a lost key.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "Name three countries in Africa.",
    "Why is the sky blue?",
    "Give me advice for a job interview.",
    "What is the difference between a lake and a sea?",
    "Write a function in Python that adds two numbers.",
    "What should I cook tonight?",
    "Summarise the history of the bicycle.",
    "How much is seventeen plus eight?",
    "Tell me something about bees.",
    "Write a poem about winter.",
    "How can I sleep better?",
    "What does a lawyer do?",
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Continuation:
    """What a model says behind a prompt, up to the token that ends it, which is not part of it."""

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Health:
    """Figures over the continuations of one model behind one kind of prompt.

    Attributes:
        repetition: mean share of 4-grams that stand in their continuation already (seq-rep-4 of
            Welleck et al., arXiv 1908.04319).
        distinct: n -> different n-grams over all, in all continuations (Li et al., arXiv
            1510.03055).
        looped: share that ends in a loop.
        stopped: share that comes to an end token.
        silent: share that says nothing.
        agreement: n -> share whose text begins with the first n tokens of the original's; none
            for the original.
        words: what is wrong beside the original.
    """

    model: str
    kind: str
    repetition: float
    distinct: dict[int, float]
    looped: float
    stopped: float
    silent: float
    agreement: dict[int, float]
    words: tuple[str, ...] = ()


def plain_prompts(starts: Starts, windows: Sequence[Sequence[int]]) -> list[str]:
    """The beginnings of windows, as text."""
    texts = (starts.text(list(window[:BEGINNING])) for window in windows)
    return [text for text in texts if text]


def chat_prompts(starts: Starts, count: int) -> list[str]:
    """Questions through the chat template; none where there is no template that takes them."""
    if starts.chat is None:
        return []
    return [
        starts.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS[:count]
    ]


def continued(
    session: Session,
    starts: Starts,
    prompts: Sequence[str],
    kind: str,
    tokens: int,
    told: Callable[[int], None] = lambda done: None,
) -> list[Continuation]:
    """Greedy continuations, all prompts in one batch."""
    special = kind == PLAIN  # a template says its special tokens itself
    ids = [starts.tokenizer(p, add_special_tokens=special)["input_ids"] for p in prompts]
    lengths = [len(prompt) for prompt in ids]
    tokens_BL = np.zeros((len(ids), max(lengths)), dtype=np.int64)
    for row, prompt in zip(tokens_BL, ids, strict=True):
        row[: len(prompt)] = prompt
    logits_BLV = session.start(tokens_BL, lengths)
    at_B = np.array(lengths) - 1
    said_B = logits_BLV[np.arange(len(ids)), at_B].argmax(-1)
    said = [said_B]
    over_B = np.isin(said_B, list(starts.ends))
    while len(said) < tokens and not over_B.all():
        told(len(said))
        said_B = session.step(said_B.astype(np.int64)).argmax(-1)
        said.append(said_B)
        over_B |= np.isin(said_B, list(starts.ends))
    return [_until_end(row.tolist(), starts) for row in np.stack(said, axis=1)]


def _until_end(ids: list[int], starts: Starts) -> Continuation:
    end = next((n for n, token in enumerate(ids) if token in starts.ends), None)
    kept = ids if end is None else ids[:end]
    return Continuation(tuple(kept), starts.tokenizer.decode(kept), end is not None)


# Figures ----------------------------------------------------------------------------------------


def judge(
    model: str,
    kind: str,
    ours: Sequence[Continuation],
    theirs: Sequence[Continuation] | None = None,
    decode: Callable[[list[int]], str] = lambda ids: "",
) -> Health:
    """Figures of continuations.

    Args:
        theirs: the original's behind the same prompts; None: these are the original's.
        decode: of the original's tokenizer.
    """
    found = Health(
        model=model,
        kind=kind,
        repetition=_mean(repetition(c.ids) for c in ours),
        distinct={n: distinct([c.ids for c in ours], n) for n in (1, 2, 3)},
        looped=_mean(loop_of(c.ids) is not None for c in ours),
        stopped=_mean(c.ended for c in ours),
        silent=_mean(not c.ids for c in ours),
        agreement={},
    )
    if theirs is None:
        return found
    longest = max((len(c.ids) for c in theirs), default=0)
    agreement = {
        n: _mean(_begins_alike(c, other, n, decode) for c, other in zip(ours, theirs, strict=True))
        for n in LENGTHS
        if n <= longest
    }
    words = tuple(_words(found, judge(model, kind, theirs), ours))
    return Health(**{**vars(found), "agreement": agreement, "words": words})


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that stood there before.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1] * 8)
    (0.0, 0.8)
    """
    grams = list(zip(*(ids[n:] for n in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], size: int) -> float:
    """Different n-grams over all, in all texts together; 1 where there is none."""
    grams = [g for ids in texts for g in zip(*(ids[n:] for n in range(size)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loop_of(ids: Sequence[int]) -> tuple[int, ...] | None:
    """The piece that a text says again and again at its end; None: it does not.

    >>> loop_of([7, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    (1, 2, 3)
    """
    for size in range(1, LONGEST_LOOP + 1):
        span = max(TURNS * size, SHORTEST)
        tail = ids[-span:]
        if len(tail) == span and all(tail[n] == tail[n - size] for n in range(size, span)):
            return tuple(ids[-size:])
    return None


def _begins_alike(
    ours: Continuation, theirs: Continuation, count: int, decode: Callable[[list[int]], str]
) -> bool:
    """As text, so that models of different vocabularies compare; an end must be one as well."""
    if len(theirs.ids) < count:
        return theirs.ended and ours.ended and ours.text == theirs.text
    return ours.text.startswith(decode(list(theirs.ids[:count])).rstrip("\ufffd"))


def _words(found: Health, original: Health, ours: Sequence[Continuation]) -> Iterator[str]:
    count = len(ours)

    def many(share: float, theirs: float) -> bool:
        return share >= MANY and share >= theirs + MORE

    def of(share: float, theirs: float) -> tuple[str, str]:
        return f"{round(share * count)} of {count}", f"{round(theirs * count)}"

    if many(found.looped, original.looped):
        (some, before), loop = of(found.looped, original.looped), _example(ours)
        yield (
            f"it repeats itself: {some} continuations end in a loop (of the original's {before}), "
            f"such as {loop!r}"
        )
    elif many(found.repetition, original.repetition):
        yield (
            f"it repeats itself: {100 * found.repetition:.0f} % of its 4-grams stand in the same "
            f"text before (of the original's {100 * original.repetition:.0f} %)"
        )
    if many(found.silent, original.silent):
        some, before = of(found.silent, original.silent)
        yield f"it says nothing: {some} continuations are empty (of the original's {before})"
    if many(original.stopped, found.stopped):
        some, before = of(found.stopped, original.stopped)
        yield f"it does not stop: {some} continuations come to an end (of the original's {before})"


def _example(ours: Sequence[Continuation]) -> str:
    looped = (c.text for c in ours if loop_of(c.ids))
    return next(looped, "")[-60:].strip()


def _mean(values: Any) -> float:
    return float(np.mean([float(value) for value in values] or [0.0]))
