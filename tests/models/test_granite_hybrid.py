"""Granite 4: words that releases read differently, refusals, and gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import SizeError, UnsupportedModelError
from dotexport.merging.neurons import Merge, Shares
from dotexport.models.config_words import settled
from dotexport.models.families import find_carrier
from dotexport.models.families.granite_hybrid import GRANITE_HYBRID, MLP
from dotexport.models.family import Linear
from dotexport.models.rope import stock_config
from dotexport.narrowing.site import new_rows
from dotexport.sizes.budget import plan
from dotexport.targets.vllm_tokens import Vllm

Tiny = Callable[..., Path]
pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="refused there")
ALL_ATTEND = {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}


def said(**words: Any) -> dict[str, Any]:
    """A config.json; without the words that are None."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 90, "mamba_n_heads": 6}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["mamba", "attention"],
    }
    class_ = {"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid"}
    all_ = {**class_, "num_local_experts": 0, **sizes, **heads, **words}
    return {key: value for key, value in all_.items() if value is not None}


def test_words_are_those_that_every_release_reads() -> None:
    steps = [0.0, {"__float__": "Infinity"}]  # as transformers 5 writes them
    kinds = {"layer_types": ["linear_attention", "full_attention"], "time_step_limit": steps}
    config = said(**kinds, intermediate_size=512, shared_intermediate_size=88)
    found = settled(config, of="here")
    assert found["layer_types"] == ["mamba", "attention"]
    assert (found["intermediate_size"], found["shared_intermediate_size"]) == (88, 88)
    assert found["position_embedding_type"] == "nope"
    assert "time_step_limit" not in found
    assert stock_config(found).time_step_limit == (0.0, float("inf"))
    assert read_model(found)[1].kinds == ("mamba", "attention")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"mamba_proj_bias": True}, "state spaces with biases"),
        ({"mamba_conv_bias": False}, "convolutions without biases"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        (ALL_ATTEND | {"position_embedding_type": None}, "knows no positions"),
        ({"layer_types": ["mamba"] * 2}, "none attends"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size = 0"),
    ],
)
def test_another_model_of_the_class_is_refused(words: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        read_model(settled(said(**words), of="here"))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("said_of_it", "experts"), [(0, 0), (4, 4), (None, 8)])
def test_experts_make_another_table_of_the_class(said_of_it: int | None, experts: int) -> None:
    """Which has 8 where nothing is said."""
    words = said(num_local_experts=said_of_it, intermediate_size=40, shared_intermediate_size=88)
    family, sizes = read_model(settled(words, of="here"))
    assert (sizes.num_experts, sizes.mixture) == (experts, bool(experts))
    assert sizes.intermediate_size == (40 if experts else 88)
    assert family is (GRANITE_HYBRID.mixture if experts else GRANITE_HYBRID)
    assert settled(settled(words, of="here"), of="here") == settled(words, of="here")


def test_the_width_stays_where_a_layer_is_a_state_space(tiny_model: Tiny) -> None:
    config = open_source(tiny_model(model_type="granitemoehybrid")).config
    with pytest.raises(SizeError, match=r"channels of state spaces.*nearest legal: 48"):
        plan(config, SizeOptions(hidden_size=40))
    alone = settled(said(**ALL_ATTEND), of="here")
    carried = plan(alone, SizeOptions(hidden_size=40))
    assert carried.carrier.architecture == "GraniteForCausalLM"
    with pytest.raises(SizeError, match="channels of state spaces"):
        plan(alone, SizeOptions(hidden_size=40, keep_class=True))


def test_a_carrier_has_such_layers_and_biases() -> None:
    family, sizes = read_model(settled(said(**ALL_ATTEND, attention_bias=True), of="here"))
    assert find_carrier(family, sizes).architecture == "GraniteForCausalLM"
    mixed = replace(sizes, kinds=("mamba", "attention"))
    assert find_carrier(family, mixed) is GRANITE_HYBRID


def test_rows_of_one_matrix_of_gate_and_up_are_those_of_two() -> None:
    """A merge may turn the sign of an up, and not that of a gate."""
    generator = torch.Generator().manual_seed(0)
    gate_NX, up_NX = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    pair_2M, halves_M = np.array([[0, 1, 0], [0, 4, 1]]), np.array([0.5, 1.0, -0.5])
    shares = Shares.between(2, 6, pair_2M, halves_M, "cpu")
    merge = Merge(torch.tensor([0, 4]), shares)
    [fused] = MLP.readers
    found = new_rows(merge, fused, torch.cat([gate_NX, up_NX]), gated=GRANITE_HYBRID.gated)
    one = Linear("up", out="mlp", in_="residual")
    expected = [
        new_rows(merge, replace(one, name="gate"), gate_NX, gated="gate"),
        new_rows(merge, one, up_NX, gated="gate"),
    ]
    assert torch.equal(found, torch.cat(expected))
    for found, rows_NX, sign in zip(expected, (gate_NX, up_NX), (1, -1), strict=True):
        mean_X = (rows_NX[0] + sign * rows_NX[1]) / 2
        assert torch.equal(found, torch.stack([mean_X, rows_NX[4]]))


def test_vllm_takes_heads_for_as_wide_as_the_stream_allows(tiny_model: Tiny) -> None:
    config = open_source(tiny_model(model_type="granitemoehybrid", head_dim=12)).config
    assert not Vllm().config_problems(config, "as-stored")
    fewer = {**config, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert "keep all KV heads" in Vllm().config_problems(fewer, "as-stored")[0]


def test_vllm_passes_over_biases_and_widths_of_heads_of_a_granite_moe(tiny_model: Tiny) -> None:
    config = open_source(tiny_model(model_type="granitemoe", head_dim=12)).config
    assert not Vllm().config_problems(config, "as-stored")
    [problem] = Vllm().config_problems({**config, "attention_bias": True}, "as-stored")
    assert "plan without --bias" in problem
    fewer = {**config, "num_attention_heads": 2, "num_key_value_heads": 1}
    [problem] = Vllm().config_problems(fewer, "as-stored")
    assert "--square and --hidden 24" in problem
