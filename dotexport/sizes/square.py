"""Square sizes: hidden_size == heads x head_dim, by dropping heads along with the width.

Some consumers take head_dim to be hidden_size / heads, whatever config.json says: Optimum 0.1.0's
ORTModelForCausalLM and vLLM's Qwen2 class among them. KV heads leave with their query heads, so
hidden_size goes in steps of what the query heads of one KV head are wide.
"""

from __future__ import annotations

from collections.abc import Mapping

from dotexport.axes.axis import FLOOR
from dotexport.axes.plan import resized
from dotexport.errors import SizeError
from dotexport.models.shapes import Sizes

COUPLED = ("hidden_size", "num_key_value_heads")
"""The two axes of a pair."""

Pair = tuple[int, int]
"""A hidden size and the number of KV heads that makes it square."""


def square_pairs(before: Sizes, *, multiple: int) -> list[Pair]:
    """All that the model can be narrowed to, ascending.

    Args:
        multiple: what a hidden size must be a multiple of.

    Raises:
        SizeError: there is none.
    """
    step = _step(before)
    most = min(before.num_key_value_heads, before.hidden_size // step)
    pairs = [(step * count, count) for count in range(1, most + 1) if step * count % multiple == 0]
    if not pairs:
        raise SizeError(
            f"--square: the query heads of one KV head are {step} wide, and no multiple of that "
            f"is a multiple of {multiple} up to hidden_size {before.hidden_size}; narrow this "
            "model without --square"
        )
    return pairs


def pairs_with(
    before: Sizes, hidden_size: int | None, num_key_value_heads: int | None, *, multiple: int
) -> list[Pair]:
    """Those with the sizes that are given, ascending.

    Raises:
        SizeError: there is none; names the nearest.
    """
    pairs = square_pairs(before, multiple=multiple)
    given = (hidden_size, num_key_value_heads)
    meant = [pair for pair in pairs if _distance(before, given, pair) == 0]
    if meant:
        return meant
    nearest = sorted(sorted(pairs, key=lambda pair: _distance(before, given, pair))[:2])
    flags = zip(("--hidden", "--kv-heads"), given, strict=True)
    asked = " ".join(f"{flag} {size}" for flag, size in flags if size is not None)
    legal = " and ".join(f"--hidden {hidden} --kv-heads {count}" for hidden, count in nearest)
    raise SizeError(
        f"--square {asked}: hidden_size must be heads x head_dim, {_step(before)} for every KV "
        f"head; the nearest legal: {legal}"
    )


def settled(before: Sizes, asked: Mapping[str, int], *, free: bool) -> dict[str, int]:
    """What was asked for, and of the pair what the sizes that are given leave no choice of.

    Args:
        free: whether a budget chooses where there is one; else the widest pair is taken.

    Raises:
        SizeError: there is none; names the nearest.
    """
    pairs = _meant(before, asked)
    if free and len(pairs) > 1:
        return dict(asked)
    return {**asked, **dict(zip(COUPLED, pairs[-1], strict=True))}


def starts(before: Sizes, asked: Mapping[str, int], *, least: float) -> list[Sizes]:
    """The sizes with every pair that is searched, from a share `least` of the width on."""
    pairs = _meant(before, asked)
    # What was asked for by number is taken however narrow.
    wide = [pair for pair in pairs if pair[0] >= least * before.hidden_size] or pairs
    return [resized(before, dict(zip(COUPLED, pair, strict=True))) for pair in wide]


def _meant(before: Sizes, asked: Mapping[str, int]) -> list[Pair]:
    hidden, count = (asked.get(name) for name in COUPLED)
    return pairs_with(before, hidden, count, multiple=FLOOR)


def _step(before: Sizes) -> int:
    """Width of the query heads that read one KV head."""
    return before.spaces["query"] // before.num_key_value_heads


def _distance(before: Sizes, given: tuple[int | None, int | None], pair: Pair) -> float:
    """Between a pair and the sizes that are given, in shares of the original."""
    whole = (before.hidden_size, before.num_key_value_heads)
    shares = zip(given, pair, whole, strict=True)
    return sum(abs(want - have) / size for want, have, size in shares if want is not None)
