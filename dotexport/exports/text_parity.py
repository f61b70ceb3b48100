"""Does an artifact read text as transformers reads it? Tokens, chat template, start and stops.

The yardstick is the tokenizer that transformers makes of the stock checkpoint, and the tokens at
which its `generate` stops. Tokens of TEXTS and of texts that name special tokens, CONVERSATIONS
through the chat template, the token that begins a text and those that end one are held against what
the artifact's own reader makes of them: `text(checkpoint, folder)` of its target, or, for a folder
with a tokenizer, transformers again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dotexport.exports.target import Target
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage.reading import read_json

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
GENERATION = "generation_config.json"
NUM_SHOWN = 2  # examples of one kind of difference

Conversation = list[dict[str, str]]

CONVERSATIONS: tuple[Conversation, ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  Name a colour.\n"},
        {"role": "assistant", "content": "Blue"},
        {"role": "user", "content": "Another, s'il vous pla\u00eet \U0001f600"},
    ],
    [
        {"role": "user", "content": "def f(x):\n\treturn x  # 1234567"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\u6771\u4eac\u306f\uff1f"},
    ],
)

# Nasty in one way each; `_texts` joins them.
WORDS = (
    *("Hello", "don't", "I'LL", "we've", "it's", "HELLO", "camelCaseWord", "snake_case", "x"),
    *("caf\u00e9", "na\u00efve", "\u00c9COLE", "Stra\u00dfe", "\u0130stanbul", "\u01c5", "\u017fs"),
    *("cafe\u0301", "\ufb01ne", "\u212b", "\u1100\u1161", "A\u030a\u0323"),  # not in NFC or NFKC
    *("\u041f\u0440\u0438\u0432\u0435\u0442", "\u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac"),
    *("\u6771\u4eac", "\u65e5\u672c\u8a9e\u3067\u3059", "\u3072\u3089\u30ab\u30bf", "\ud55c\uad6d"),
    *("\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0e2a\u0e27\u0e31\u0e2a"),
    *("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0b95\u0bcd\u0b95", "\u1f71"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"),
    *("\u2764\ufe0f", "\U0001d518", "\U00020000", "\u200b", "\ufeff", "\u202e", "\ue000", "\x00"),
)
DIGITS = (
    *("0", "12", "123", "1234", "12345", "1234567890", "3.14", "1,000,000", "-42", "1e-9", "0x1F"),
    *("2024-01-31", "12:30", "v1.2.3", "a1b2", "7x", "x7", "100%", "$5", "\u0663\u0664", "\u00bd"),
    *("\u00b2", "\u2167", "\u3007\u4e8c", "\uff11\uff12"),
)
SPACES = (
    *(" ", "  ", "   ", "    ", " " * 7, " " * 17, "\t", "\t\t", " \t ", "\n", "\n\n", "\n\n\n"),
    *("\r\n", "\r", " \n", "\n ", "  \n  ", "\n\t\n", "\u00a0", "\u3000", "\u2003", "\x0b", "\x0c"),
    *("\u2028", "\u0085", "\u2581", "\u2581\u2581"),
)
MARKS = (
    *(
        ".",
        "...",
        "!?",
        "--",
        "==",
        "!=",
        "=>",
        "<<",
        "//",
        "/*",
        "()",
        "[]",
        "{}",
        "}}",
        "'",
        "''",
    ),
    *('"', "`", "```", "\\", "\\n", "@", "#", "~", "^", "|", "$", "&&", "+", "%", "_", "__", "'s"),
    *(
        "\u2026",
        "\u201cx\u201d",
        "\u00bf",
        "\u3002",
        "\uff01",
        "\u2014",
        "\u20ac",
        "\u00a7",
        "\u2192",
    ),
)
LINES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x: int) -> str:\n    return f'{x!r}' * 3\n",
    "for i in range(10):\n\tprint(i)\n\n\nif x==1 :  y+=2",
    '{"a": [1, 2.50, null], "b\\n": "\\u00e9"}',
    "<div class='x'>&nbsp;</div><!-- 100 -->",
    "https://example.org/a?b=1&c=%20#d user@example.org",
    "SELECT * FROM t WHERE a>=10 AND b<>'it''s';",
    "\\frac{1}{2}\\sum_{i=0}^{n} x_i^2",
    "x =  12",
    " a b  c   d    e",
    "leading\n  indented\n    more\n\tand tab",
    'He said:"No!"(twice),then left...',
    "\u6771\u4eac 42 km, caf\u00e9 & \u041c\u043e\u0441\u043a\u0432\u0430\u2014\u03b1\u03b2 123",
    "abc\u0434\u0435\u0444\u6f22\u5b57\U0001f600xyz",
    "a" * 50,
    "=" * 40,
    "1" * 40,
    "\U0001f600" * 5,
    " hello world ",
    "\ttab first",
    "\nnewline first",
)


def _texts() -> tuple[str, ...]:
    """About 200: words alone, digits and marks against words, spaces between them."""
    between = [f"a{space}b{space}" for space in SPACES]
    inside = [f"no{mark}Yes {mark}1" for mark in MARKS]
    numbers = [f"{digits} x{digits}" for digits in DIGITS]
    return tuple(dict.fromkeys(("", *WORDS, *numbers, *SPACES, *between, *inside, *LINES)))


TEXTS = _texts()


def _never(text: str) -> str | None:
    return None


@dataclass(frozen=True)
class TextSide:
    """What some reader makes of text.

    Attributes:
        encode: the tokens of a text, what every text begins and ends with included.
        render: a conversation through the chat template, ready for an answer; None: there is no
            template, or it refuses such a conversation.
        start: the token that begins a text.
        stops: tokens that end a generation.
        own_stops: tokens at which a runtime may stop in any model, whatever the file says.
        excuse: why no artifact could hold this text's tokens; None: it should. Told in a warning,
            and never asked for conversations.
        pieces: its vocabulary and merges as tokenizers stores them, for a piece that no text of
            ours needs; None: it is of another form.
    """

    encode: Callable[[str], list[int]]
    render: Callable[[Conversation], str | None]
    start: int | None
    stops: frozenset[int]
    own_stops: frozenset[int] = frozenset()
    excuse: Callable[[str], str | None] = _never
    pieces: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TextVerdict:
    """What came out: problems, and what was looked at."""

    problems: tuple[str, ...] = ()
    num_texts: int = 0
    num_conversations: int = 0
    excused: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "texts": self.num_texts,
            "conversations": self.num_conversations,
            "problems": list(self.problems),
            "excused": list(self.excused),
        }


def check_text(target: Target, folder: Path, checkpoint: Checkpoint) -> TextVerdict | None:
    """Hold the text side of an artifact against that of the stock checkpoint; None: one of them has
    none."""
    tokenizer = find_tokenizer(checkpoint.folder)
    if tokenizer is None:
        return None
    wanted = _text_side(tokenizer, checkpoint.folder)
    ask = getattr(target, "text", None)
    try:
        found: TextSide | None = ask(checkpoint, folder) if ask else read_folder(folder)
    except Exception as error:  # each reader has its own; all of them mean "does not read"
        logger.debug("text of %s cannot be read", folder, exc_info=True)
        return TextVerdict((f"text: its tokenizer cannot be read: {error}; export it again",))
    if found is None:
        return None
    verdict = hold(found, wanted, special=special_tokens(tokenizer))
    return replace(verdict, problems=(*verdict.problems, *_told_ends(folder, wanted)))


def _told_ends(folder: Path, wanted: TextSide) -> Iterator[str]:
    """What a generation_config.json beside the artifact says, whoever reads it."""
    if wanted.stops and (folder / GENERATION).is_file():
        said = set(stops_of(folder))
        if said != wanted.stops:
            yield (
                f"stop tokens: {GENERATION} beside it says {_listed(said) or 'none'}, and "
                f"transformers has {_listed(wanted.stops)}"
            )


def hold(found: TextSide, wanted: TextSide, *, special: Iterable[str] = ()) -> TextVerdict:
    """Compare two readers; `special` are tokens that texts name."""
    texts = [*TEXTS, *_naming(special)]
    excused: Counter[str] = Counter()
    different = []
    for text in texts:
        if found.encode(text) != wanted.encode(text):
            reason = found.excuse(text)
            if reason:
                excused[reason] += 1
            else:
                different.append(text)
    told = tuple(f"{reason} ({number} of {len(texts)} texts)" for reason, number in excused.items())
    for reason in told:
        logger.warning("tokens differ from transformers': %s", reason)
    problems = [
        *_token_problems(found, wanted, different, len(texts)),
        *_piece_problems(found.pieces, wanted.pieces),
        *_conversation_problems(found, wanted),
        *_end_problems(found, wanted),
    ]
    conversations = sum(wanted.render(one) is not None for one in CONVERSATIONS)
    return TextVerdict(tuple(problems), len(texts), conversations, told)


def _naming(special: Iterable[str]) -> Iterator[str]:
    """Texts that name tokens: alone, between words, beside spaces, and one after another."""
    named = list(special)
    for token in named:
        yield token
        yield f"a{token}b"
        yield f" {token} \n{token}x 1"
    yield "".join(named)


def _token_problems(
    found: TextSide, wanted: TextSide, different: list[str], number: int
) -> Iterator[str]:
    if different:
        shown = "; ".join(
            f"{_short(text)} is {_short(found.encode(text))} where transformers has "
            f"{_short(wanted.encode(text))}"
            for text in different[:NUM_SHOWN]
        )
        yield f"text: tokens of {len(different)} of {number} texts differ: {shown}"


def _piece_problems(
    found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None
) -> Iterator[str]:
    if found is None or wanted is None:
        return
    other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if other:
        yield f"text: {', '.join(other)} of its tokenizer.json are not the checkpoint's"


def _conversation_problems(found: TextSide, wanted: TextSide) -> Iterator[str]:
    for number, conversation in enumerate(CONVERSATIONS, start=1):
        mine, theirs = found.render(conversation), wanted.render(conversation)
        if mine != theirs:
            yield (
                f"chat template: conversation {number} becomes {_short(mine)} where transformers "
                f"makes {_short(theirs)}"
            )
        elif mine is not None and found.encode(mine) != wanted.encode(mine):
            excuse = found.excuse(mine)
            yield (
                f"chat template: tokens of conversation {number} differ"
                + (f": {excuse}" if excuse else "")
            )


def _end_problems(found: TextSide, wanted: TextSide) -> Iterator[str]:
    if wanted.start is not None and found.start != wanted.start:
        yield f"start token: {found.start} where transformers has {wanted.start}"
    if not wanted.stops:
        return  # transformers does not stop by itself
    if missing := wanted.stops - found.stops:
        yield f"stop tokens: {_listed(missing)} of transformers' {_listed(wanted.stops)} missing"
    if more := found.stops - wanted.stops - found.own_stops:
        yield f"stop tokens: {_listed(more)} beside transformers' {_listed(wanted.stops)}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


# What transformers reads --------------------------------------------------------------------------


def read_folder(
    folder: Path, *, start: int | None = None, stops: Iterable[int] | None = None
) -> TextSide | None:
    """The text side of a folder as transformers reads it; None: it holds no tokenizer.

    Args:
        start, stops: what another file of the folder says of them.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    side = _text_side(tokenizer, folder)
    start = side.start if start is None else start
    return replace(side, start=start, stops=side.stops if stops is None else frozenset(stops))


def _text_side(tokenizer: Any, folder: Path) -> TextSide:
    return TextSide(
        encode=lambda text: list(tokenizer(text)["input_ids"]),
        render=partial(_rendered, tokenizer),
        start=start_of(folder, tokenizer),
        stops=frozenset(stops_of(folder)),
        pieces=_pieces(tokenizer),
    )


def _pieces(tokenizer: Any) -> Mapping[str, Any] | None:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return None if fast is None else json.loads(fast.to_str())["model"]


def find_tokenizer(folder: Path) -> Any:
    """As `load_tokenizer`; one that transformers cannot read is none, and a warning."""
    try:
        return load_tokenizer(folder)
    except Exception as error:  # each tokenizer has its own
        logger.warning("transformers cannot read the tokenizer of %s: %s", folder, error)
        return None


def load_tokenizer(folder: Path) -> Any:
    """What transformers makes of a folder, without remote code; None: it holds no tokenizer."""
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    found = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found.model_max_length = int(1e30)  # what a config says of it cuts nothing here
    return found


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that every text begins and ends with.

    A post-processor may come in many forms (templates, sequences of them, BERT's own); this asks
    what it does.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []


def start_of(folder: Path, tokenizer: Any) -> int | None:
    """The token that begins a text: the one which the tokenizer puts there, or the one that is
    named."""
    before = added_around(tokenizer)[0] if tokenizer is not None else []
    named = [_named(folder, "bos_token_id"), [getattr(tokenizer, "bos_token_id", None)]]
    numbers = [*before, *(n for group in named for n in group if isinstance(n, int) and n >= 0)]
    return numbers[0] if numbers else None


def stops_of(folder: Path) -> list[int]:
    """The tokens at which `generate` ends: of generation_config.json, else of config.json."""
    return [n for n in _named(folder, "eos_token_id") if isinstance(n, int) and n >= 0]


def _named(folder: Path, key: str) -> list[Any]:
    for name in (GENERATION, "config.json"):
        file = folder / name
        said = read_json(file, advice="take a fresh copy") if file.is_file() else {}
        value = said.get(key)
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts of tokens that are no words: the first few, and the last."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    texts = [str(token) for _, token in sorted(added.items())]
    return [*texts[:8], *texts[8:][-2:]]


def render(template: str, conversation: Conversation, **tokens: str | None) -> str | None:
    """A conversation through a template that stands in a file of another kind."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return _rendered(bare, conversation, chat_template=template, **tokens)


def _rendered(tokenizer: Any, conversation: Conversation, **more: Any) -> str | None:
    if not (more.get("chat_template") or tokenizer.chat_template):
        return None
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **more
        )
    except (TemplateError, ValueError):  # some take no system role, or have only named templates
        return None
    return text
