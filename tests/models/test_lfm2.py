"""LFM2: the width that its class builds is read and written, and hidden_size stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import CheckpointError, SizeError
from dotexport.models.config_words import settled
from dotexport.models.rope import stock_config
from dotexport.sizes.budget import plan
from dotexport.targets.vllm_tokens import Vllm

Tiny = Callable[..., Path]
LATER = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="refused there")


@LATER
@pytest.mark.parametrize(
    "words",
    [
        {"block_ff_dim": 200, "block_multiple_of": 64},
        {"intermediate_size": 200, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 8},
        {"intermediate_size": 200, "block_auto_adjust_ff_dim": False},
    ],
)
def test_the_width_of_an_mlp_is_what_the_class_builds(words: dict[str, Any]) -> None:
    said = {"model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}
    config = said | heads | words | {"architectures": ["Lfm2ForCausalLM"], "tie_embedding": False}
    found = settled(config, of="here")
    built = []
    for one in (config, found):
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(stock_config(one))
        built.append(model.model.layers[0].feed_forward.w1.out_features)
    assert [found["intermediate_size"]] * 2 == built
    assert found["layer_types"] == ["conv", "full_attention"]
    assert not {"full_attn_idxs", "block_ff_dim", "tie_embedding"} & set(found)
    assert not found["tie_word_embeddings"]
    assert read_model(found)[1].intermediate_size == built[0]


@LATER
@pytest.mark.parametrize(
    "words",
    [
        {"layer_types": "conv"},
        {"block_ffn_dim_multiplier": "wide"},
        {"block_multiple_of": 0},
        {"intermediate_size": None},
    ],
)
def test_words_that_make_no_width_are_refused(words: dict[str, Any]) -> None:
    said = {"model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv"] * 2}
    config = said | heads | words | {"architectures": ["Lfm2ForCausalLM"]}
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model(settled(config, of="here"))


def test_a_narrower_stream_is_refused_with_what_would_be_narrowed_too(tiny_model: Tiny) -> None:
    config = open_source(tiny_model(model_type="lfm2", intermediate_size=132)).config
    with pytest.raises(SizeError, match=r"channels of convolutions.*nearest legal: 48") as caught:
        plan(config, SizeOptions(hidden_size=40))
    assert caught.value.exit_code == SizeError.exit_code


def test_vllm_takes_heads_for_as_wide_as_the_stream_allows(tiny_model: Tiny) -> None:
    changes = {"model_type": "lfm2", "intermediate_size": 132, "head_dim": 12}
    config = open_source(tiny_model(**changes)).config
    assert not Vllm().config_problems(config, "as-stored")
    fewer = {**config, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert "keep all KV heads" in Vllm().config_problems(fewer, "as-stored")[0]
