"""Square sizes: every pair of a hidden size and KV heads that is offered is one in which
hidden_size is heads x head_dim, none is left out, and a refusal names the nearest. The reference
tries all pairs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from dotexport.axes.plan import SizeOptions, resized
from dotexport.errors import SizeError
from dotexport.models.families import find_family
from dotexport.models.shapes import Sizes, read_sizes
from dotexport.sizes.budget import plan
from dotexport.sizes.square import Pair, pairs_with, square_pairs


def sizes(hidden: int, heads: int, groups: int, head_dim: int) -> Sizes:
    return Sizes(
        hidden_size=hidden,
        intermediate_size=128,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_layers=2,
        vocab_size=90,
        tied=False,
    )


# Name -> hidden size, heads, KV heads, head_dim: square before, wider and narrower inside than
# outside, one KV head, a KV head for each query head, a step that is no multiple of 8.
MODELS = {
    "grouped": sizes(256, 16, 8, 16),
    "wide inside": sizes(128, 16, 8, 16),
    "narrow inside": sizes(512, 16, 8, 16),
    "one group": sizes(256, 8, 1, 32),
    "no groups": sizes(192, 12, 12, 16),
    "odd step": sizes(180, 9, 3, 20),
}
MULTIPLES = (1, 8, 32, 64)


def tried_out(before: Sizes, multiple: int) -> list[Pair]:
    """All pairs of a hidden size and KV heads that are square, by looking at every one."""
    widths, groups = range(1, before.hidden_size + 1), range(1, before.num_key_value_heads + 1)
    found = []
    for hidden, count in itertools.product(widths, groups):
        after = resized(before, {"hidden_size": hidden, "num_key_value_heads": count})
        if hidden % multiple == 0 and hidden == after.num_attention_heads * after.head_dim:
            found.append((hidden, count))
    return found


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("name", MODELS)
def test_the_pairs_are_all_in_which_hidden_size_is_heads_times_head_dim(
    name: str, multiple: int
) -> None:
    before = MODELS[name]
    wanted = tried_out(before, multiple)
    if wanted:
        assert square_pairs(before, multiple=multiple) == wanted
        return
    with pytest.raises(SizeError, match=f"a multiple of {multiple} up to .*{before.hidden_size};"):
        square_pairs(before, multiple=multiple)


def test_a_refusal_of_all_names_the_step_and_what_to_do() -> None:
    """Eight heads of 32 read the only KV head: 256, where 128 is all there is."""
    with pytest.raises(SizeError, match=r"one KV head are 256 wide, .* without --square"):
        square_pairs(replace(MODELS["one group"], hidden_size=128), multiple=8)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_are_given_leave_the_pairs_that_have_them(name: str) -> None:
    before = MODELS[name]
    pairs = square_pairs(before, multiple=1)
    assert pairs_with(before, None, None, multiple=1) == pairs
    for hidden, count in pairs:
        for given in ((hidden, None), (None, count), (hidden, count)):
            assert pairs_with(before, *given, multiple=1) == [(hidden, count)]


@pytest.mark.parametrize(
    ("name", "given", "asked", "nearest"),
    [
        ("grouped", (100, None), "--hidden 100", [(96, 3), (128, 4)]),
        ("grouped", (1, None), "--hidden 1", [(32, 1), (64, 2)]),
        ("grouped", (5000, None), "--hidden 5000", [(224, 7), (256, 8)]),
        ("grouped", (None, 9), "--kv-heads 9", [(224, 7), (256, 8)]),
        ("narrow inside", (32, 8), "--hidden 32 --kv-heads 8", [(224, 7), (256, 8)]),
        ("grouped", (64, 3), "--hidden 64 --kv-heads 3", [(64, 2), (96, 3)]),
    ],
)
def test_a_refusal_names_what_was_asked_and_the_nearest_two(
    name: str, given: tuple[int | None, int | None], asked: str, nearest: list[Pair]
) -> None:
    """Distances are shares of the original: of 512, 64 are as far as one KV head of eight."""
    before = MODELS[name]
    with pytest.raises(SizeError) as refused:
        pairs_with(before, *given, multiple=8)
    text = str(refused.value)
    assert text.startswith(f"--square {asked}: ")
    assert "32 for every KV head" in text
    offered = re.findall(r"--hidden (\d+) --kv-heads (\d+)", text.partition("legal: ")[2])
    found = [(int(hidden), int(count)) for hidden, count in offered]
    assert found == nearest
    # Whatever is offered is taken, and no other pair is nearer.
    far = [_far(before, given, pair) for pair in found]
    others = [p for p in square_pairs(before, multiple=8) if p not in found]
    assert max(far) <= min(_far(before, given, pair) for pair in others)
    for pair in found:
        assert pairs_with(before, *pair, multiple=8) == [pair]


def _far(before: Sizes, given: tuple[int | None, int | None], pair: Pair) -> float:
    hidden, count = given
    off = 0.0 if hidden is None else abs(hidden - pair[0]) / before.hidden_size
    return off if count is None else off + abs(count - pair[1]) / before.num_key_value_heads


def config(**changes: Any) -> dict[str, Any]:
    """Square at the start: 16 heads of 64, two to a KV head."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1000,
        **changes,
    }


def test_a_square_plan_needs_no_head_dim_in_its_config() -> None:
    """What those consumers do who take head_dim to be hidden_size / heads, they do rightly."""
    for count in range(1, 9):
        asked = SizeOptions(num_key_value_heads=count, square=True)
        after = plan(config(), asked).after
        said = config(
            hidden_size=after.hidden_size,
            num_attention_heads=after.num_attention_heads,
            num_key_value_heads=after.num_key_value_heads,
        )
        del said["head_dim"]
        assert read_sizes(find_family(said), said).spaces == after.spaces


def test_square_sizes_follow_from_one_of_the_two() -> None:
    by_width = plan(config(), SizeOptions(hidden_size=768, square=True)).after
    by_heads = plan(config(), SizeOptions(num_key_value_heads=6, square=True)).after
    assert by_width == by_heads
    assert (by_width.hidden_size, by_width.num_attention_heads) == (768, 12)
    nearest = "--hidden 640 --kv-heads 5 and --hidden 768 --kv-heads 6"
    for asked in (
        SizeOptions(hidden_size=704, square=True),
        SizeOptions(params="0.7x", hidden_size=704, square=True),
    ):
        with pytest.raises(SizeError, match=nearest):
            plan(config(), asked)
    with pytest.raises(SizeError, match=r"--hidden 768 --kv-heads 8: hidden_size must be"):
        plan(config(), SizeOptions(hidden_size=768, num_key_value_heads=8, square=True))


def test_a_model_that_is_not_square_becomes_so_or_is_refused() -> None:
    wide = config(head_dim=128)  # heads of 2048
    after = plan(wide, SizeOptions(intermediate_size=2048, square=True)).after
    assert (after.hidden_size, after.num_attention_heads, after.num_key_value_heads) == (1024, 8, 4)
    with pytest.raises(SizeError, match="without --square"):
        plan({**wide, "num_key_value_heads": 1}, SizeOptions(params="0.7x", square=True))
