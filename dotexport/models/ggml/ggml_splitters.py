"""llama.cpp's pre-tokenizers: how each cuts a text into words, and which cuts as a tokenizer does.

A GGUF file says how text is cut by a name alone, so the name is found by what it does: the words of
many texts, cut by the tokenizer and by each of llama.cpp's. Patterns are applied one after another,
each to what the last one left; text between two matches is a word as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"  # what is left is \s+
)
ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
FOLDED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
WORD = r"[^\r\n\p{L}\p{N}]?"
PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCE = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _cased(*, ending: str, digits: str) -> str:
    return rf"{WORD}{UPPER}*{LOWER}+{ending}|{WORD}{UPPER}+{LOWER}*{ending}|{digits}|{PATHS}"


def _meant(*, ending: str, digits: str) -> str:
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return rf"{WORD}{upper}*{lower}+{ending}|{WORD}{upper}+{lower}*{ending}|{digits}|{PATHS}"


# Patterns that llama.cpp cuts by only nearly: names for want of exact ones.
NEARLY = {
    _meant(ending="", digits=r"\p{N}"): "tekken",
    _meant(ending=f"{FOLDED}?", digits=r"\p{N}{1,3}"): "gpt-4o",
}


class Splitter(NamedTuple):
    """Attributes:
    patterns: as above.
    whole_words: whether a word that is a token stays one, whatever its merges say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False


# Those that several names share have the oldest; the first of equals is taken.
SPLITTERS = {
    "gpt-2": Splitter((GPT2,)),
    "smollm": Splitter((r"\p{N}", GPT2)),
    "llama-bpe": Splitter((rf"{ENDINGS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}",), whole_words=True),
    "smaug-bpe": Splitter((rf"{ENDINGS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}",)),
    "qwen2": Splitter((rf"{ENDINGS}|{WORD}\p{{L}}+|\p{{N}}|{MARKS}",)),
    "qwen35": Splitter(
        (
            rf"{ENDINGS}|{WORD}[\p{{L}}\p{{M}}]+|\p{{N}}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Splitter((_cased(ending="", digits=r"\p{N}"),), whole_words=True),
    "gpt-4o": Splitter((_cased(ending=f"{ENDINGS}?", digits=r"\p{N}{1,3}"),)),
    "deepseek-v3": Splitter(
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", PUNCTUATED)
    ),
    "falcon": Splitter((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "bloom": Splitter((SENTENCE,)),
    "viking": Splitter((SENTENCE, r"\p{N}")),
    "seed-coder": Splitter(
        (
            rf"{ENDINGS}|{WORD}\p{{L}}+|\p{{N}}{{1}}"
            r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "default": Splitter((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


# Names of llama.cpp for what one above does.
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt-2": ("phi-2", "olmo", "mpt", "jais", "trillion", "exaone4", "gigachat", "mellum"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"),
    "smaug-bpe": ("dbrx",),
    "gpt-4o": ("llama4",),
}
# What tokenizers of these names themselves cut by; llama.cpp has patterns of the same effect for
# some, and of nearly the same for others.
STOCK = {
    "llama-bpe": rf"{FOLDED}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}",
    "smaug-bpe": rf"{FOLDED}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}",
    "qwen2": rf"{FOLDED}|{WORD}\p{{L}}+|\p{{N}}|{MARKS}",
    **{name: pattern for pattern, name in NEARLY.items()},
}


def find_alias(name: str) -> str | None:
    """The name above for one that a file gives; None: none of these cuts as that does."""
    if name in SPLITTERS:
        return name
    return next((known for known, others in ALIASES.items() if name in others), None)


def stock_cutter(name: str) -> Any:
    """The pre-tokenizer of tokenizers that go by this name in llama.cpp."""
    from tokenizers import Regex, pre_tokenizers

    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, stock_cutter("gpt-2")])
    if name not in STOCK:
        return cutter(name)
    words = pre_tokenizers.Split(Regex(STOCK[name]), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, letters])


@cache
def cutter(name: str) -> Any:
    """A pre-tokenizer of the tokenizers package that cuts as llama.cpp's of this name does."""
    from tokenizers import Regex, pre_tokenizers

    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITTERS[name].patterns
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, letters])


def find_splitter(backend: Any, texts: Iterable[str], *, whole_words: bool) -> str:
    """llama.cpp's name for what a tokenizer of the tokenizers package does before its merges; where
    none does the same, the one made for its pattern, or the nearest, and a warning."""
    known = [
        text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        for text in texts
    ]
    meant = [_words(backend.pre_tokenizer, text) for text in known]

    def different(name: str) -> list[str]:
        pairs = zip(known, meant, strict=True)
        return [text for text, words in pairs if _words(cutter(name), text) != words]

    found = {name: different(name) for name in SPLITTERS}

    def distance(name: str) -> tuple[int, bool]:
        return len(found[name]), SPLITTERS[name].whole_words != whole_words

    nearest = min(found, key=distance)
    if found[nearest]:
        stored = json.loads(backend.to_str())["pre_tokenizer"]
        steps = stored.get("pretokenizers", [stored])
        patterns = [step.get("pattern", {}).get("Regex") for step in steps]
        nearest = next((NEARLY[p] for p in patterns if p in NEARLY), nearest)
        logger.warning(
            "llama.cpp has no pre-tokenizer that cuts text as this tokenizer does; the nearest, "
            "%r, cuts %d of %d texts otherwise, such as %r",
            *(nearest, len(found[nearest]), len(known), found[nearest][0]),
        )
    return nearest


def _words(pre_tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
