"""Axes that stay whole, and rows that nothing fills: who says so, and what would help."""

from __future__ import annotations

from typing import Any

import pytest

from dotexport.axes.plan import SizeOptions
from dotexport.errors import SizeError
from dotexport.sizes.budget import plan
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.frozen import frozen
from dotexport.sizes.full_rows import advice, newly_torn
from dotexport.sizes.planning import choose

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WINDOWED: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 2,
    "head_dim": 64,
}
BUDGET = SizeOptions(params="0.7x")


def test_a_target_that_freezes_an_axis_is_named_with_its_rule_and_the_free_class() -> None:
    chosen = choose(WINDOWED, BUDGET, Deployment(targets=("vllm",)))
    assert chosen.plan.after.hidden_size == 576
    [said] = [
        sentence for sentence in chosen.frozen if sentence.startswith("hidden_size stays 576")
    ]
    assert "vllm takes no smaller one" in said
    assert "is not 9 heads of 64, and vLLM's Qwen2ForCausalLM passes over head_dim" in said
    assert "GraniteForCausalLM computes the same and would take it, but it attends to no" in said
    assert chosen.as_dict()["frozen"] == chosen.frozen


def test_the_class_that_the_user_forbade_is_named() -> None:
    config = {**WINDOWED, "use_sliding_window": False, "sliding_window": None}
    asked = SizeOptions(params="0.7x", keep_class=True)
    chosen = choose(config, asked, Deployment(targets=("vllm",)))
    assert any("--keep-class keeps it out" in sentence for sentence in chosen.frozen)
    assert choose(config, BUDGET, Deployment(targets=("vllm",))).frozen == []


def test_a_class_alone_can_freeze_an_axis_which_shrink_says_too() -> None:
    config = {**LLAMA, "hidden_size": 72, "num_key_value_heads": 1, "head_dim": 8}
    asked = SizeOptions(params="0.8x", keep_class=True)
    decided = plan(config, asked)
    [said] = frozen(config, asked, decided, {})
    assert said.startswith("hidden_size stays 72: LlamaForCausalLM takes no smaller one (64 is not")
    assert "MistralForCausalLM computes the same and would take it, but --keep-class" in said


def test_an_axis_that_nothing_froze_is_not_told() -> None:
    for asked in (BUDGET, SizeOptions(params="0.97x"), SizeOptions(hidden_size=512)):
        assert choose(LLAMA, asked, Deployment(targets=("gguf:int8",))).frozen == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}, "are full, as"),
        ({}, "cannot fill rows of 256: heads x head_dim 576 is no multiple of 256"),
        (
            {
                "hidden_size": 200,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 64,
            },
            "hidden_size 200 is no multiple of 256",
        ),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}, "--hidden 512`"),
        (
            {"num_key_value_heads": 9, "head_dim": 64, "intermediate_size": 1500},
            "--hidden 512 --intermediate 1280 --kv-heads 8`",
        ),
    ],
)
def test_rows_that_are_torn_are_told_with_the_flags_that_fill_them(
    changes: dict[str, Any], said: str
) -> None:
    assert said in advice({**LLAMA, **changes}, 256)


def test_the_flags_that_are_told_work_in_one_step() -> None:
    pytest.importorskip("dotexport.targets.ggml")
    config = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    where = Deployment(targets=("gguf:int4",))
    with pytest.raises(SizeError, match=r"gguf:fp16: there are such sizes(.|\n)*are full"):
        choose(config, SizeOptions(intermediate_size=1496), where)
    assert choose(config, SizeOptions(intermediate_size=1504), where)
    odd = {**LLAMA, "head_dim": 20}
    with pytest.raises(SizeError, match=r"cannot fill rows of 32: heads x head_dim"):
        choose(odd, BUDGET, where)


def test_rows_that_a_target_likes_best_are_kept_where_they_can_be() -> None:
    pytest.importorskip("dotexport.targets.ggml")
    eight = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    eight |= {"hidden_size": 1024, "intermediate_size": 4096}
    for config, group in ((eight, 256), (LLAMA, 32)):  # 9 heads of 64 fill no rows of 256
        choice = choose(config, BUDGET, Deployment(targets=("gguf:int4-k",)))
        after = choice.plan.after
        assert after.hidden_size % group == after.intermediate_size % group == 0
        assert choice.plan.ratio <= 0.71
        assert ("gguf-int4-k, rows of 256" in choice.binding) == (group == 256)


def test_widths_that_filled_groups_of_32_and_do_no_more_are_told() -> None:
    for size, told in ((1504, 0), (1512, 1)):
        found = newly_torn(plan(LLAMA, SizeOptions(intermediate_size=size)))
        assert [
            said.startswith("intermediate_size 1512 is no multiple of 32") for said in found
        ] == [True] * told
    odd = {**LLAMA, "intermediate_size": 1544}  # as torn before
    assert not newly_torn(plan(odd, SizeOptions(intermediate_size=1512)))
