"""Fewer layers: every key of config.json that says something of each layer follows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import SizeError
from dotexport.sizes.budget import plan

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 90,
}
FULL, SLIDING = "full_attention", "sliding_attention"
KEPT = (0, 1, 3, 5)


def written(config: dict[str, Any], kept: tuple[int, ...] = KEPT) -> dict[str, Any]:
    whole = {**SIZES, **config}
    family, before = read_model(whole)
    after = resized(before, {"num_hidden_layers": len(kept)})
    return Plan(family, before, after, layers=kept).config(whole)


def model(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **others}


def test_lists_with_an_entry_for_each_layer_keep_those_of_the_layers_that_stay() -> None:
    kinds = [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]
    found = written(
        model(
            "gemma2",
            "Gemma2ForCausalLM",
            layer_types=kinds,
            sliding_window=16,
            of_each=list("abcdef"),
            eos_token_id=[1, 2],
        )
    )
    assert found["layer_types"] == [kinds[layer] for layer in KEPT]
    assert found["of_each"] == list("abdf")
    assert found["eos_token_id"] == [1, 2]
    assert found["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    "config",
    [
        model("gemma2", "Gemma2ForCausalLM", sliding_window=16),
        model("gemma3_text", "Gemma3ForCausalLM", sliding_window=16, sliding_window_pattern=3),
        model(
            "qwen2",
            "Qwen2ForCausalLM",
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=3,
        ),
    ],
    ids=lambda config: config["model_type"],
)
def test_kinds_that_a_class_derives_from_a_layers_number_stay_with_their_layer(
    config: dict[str, Any],
) -> None:
    """As transformers itself reads both configs."""

    def kinds(of: dict[str, Any]) -> list[str]:
        rest = {key: value for key, value in of.items() if key not in ("model_type", "dtype")}
        return list(AutoConfig.for_model(of["model_type"], **rest).layer_types)

    before = kinds({**SIZES, **config})
    assert len(set(before)) == 2
    assert kinds(written(config)) == [before[layer] for layer in KEPT]


def test_the_count_of_layers_that_see_everything_is_of_those_that_stay() -> None:
    config = model(
        "qwen2",
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=3,
    )
    assert written(config)["max_window_layers"] == 2


def test_layers_of_one_kind_need_no_list() -> None:
    assert "layer_types" not in written(model("llama", "LlamaForCausalLM"))


@pytest.mark.parametrize("count", [0, 7, -1])
def test_a_number_of_layers_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(SizeError, match=f"--layers {count}"):
        plan({**SIZES, **model("llama", "LlamaForCausalLM")}, SizeOptions(num_hidden_layers=count))
