"""Texts and conversations that readers of one tokenizer disagree on, each nasty in one way."""

from __future__ import annotations

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
