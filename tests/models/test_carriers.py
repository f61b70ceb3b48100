"""A model under another class is the same model: every matrix of the carrier is made of numbers
that the original stores, at the place where the class reads them, and torch computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dotexport.axes.carrying import carry, carry_config
from dotexport.axes.plan import SizeOptions
from dotexport.errors import UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import SUPPORTED, carried_biases, find_carrier
from dotexport.models.loading import load_float32
from dotexport.models.rope import stock_config
from dotexport.models.shapes import read_sizes
from dotexport.sizes.budget import plan

SQUARE = {"head_dim": None, "hidden_size": 64}  # four heads of 16
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
QWEN2 = SQUARE | {"model_type": "qwen2"}
LLAMA, GRANITE = ("LlamaForCausalLM", "GraniteForCausalLM")
# Six heads of 12: a hidden size of 40, which they do not divide, can be asked for as well.
ODD = {"model_type": "qwen2", "hidden_size": 72, "num_attention_heads": 6, "head_dim": None}
PHI3 = SQUARE | {"model_type": "phi3"}
# Name -> a model, the hidden size it is cut to besides its MLP, and the class that is written.
CARRIED: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "qwen2": (QWEN2, None, LLAMA),
    "qwen2 tied": (QWEN2 | {"tie_word_embeddings": True}, None, LLAMA),
    "qwen2 of odd width": (ODD, 40, GRANITE),
    "phi3": (PHI3, None, "MistralForCausalLM"),
}
TOKENS_BL = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))

Make = Callable[..., Path]


def carried(source: Checkpoint, hidden: int | None = None) -> Checkpoint:
    """The original at full size in the words of the class that a cut to `hidden` is written as."""
    asked = SizeOptions(intermediate_size=80, hidden_size=hidden)
    return carry(source, plan(source.config, asked))[0]


def granite(make: Make, multipliers: tuple[float, float, float], *, tied: bool) -> Checkpoint:
    embedding, residual, logits_scaling = multipliers
    return Checkpoint.open(
        make(
            model_type="granite",
            embedding_multiplier=embedding,
            residual_multiplier=residual,
            logits_scaling=logits_scaling,
            attention_multiplier=0.1,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )


@torch.inference_mode()
def logits(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found: torch.Tensor = load_float32(checkpoint).to(dtype)(input_ids=TOKENS_BL).logits
    return found


@pytest.mark.parametrize("name", CARRIED)
def test_every_tensor_has_the_shape_that_the_carrier_calls_for(name: str, tiny_model: Make) -> None:
    changes, hidden, architecture = CARRIED[name]
    source = Checkpoint.open(tiny_model(**changes))
    found = carried(source, hidden)
    assert found.config["architectures"] == [architecture] != source.config["architectures"]
    stock = AutoModelForCausalLM.from_config(stock_config(found.config))
    expected = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    if changes.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    assert {name: spec.shape for name, spec in found.specs.items()} == expected
    for tensor, spec in found.specs.items():
        value = found.tensor(tensor)
        assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype)


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied", "qwen2 of odd width"])
def test_a_change_of_names_alone_changes_no_bit_of_any_logit(name: str, tiny_model: Make) -> None:
    changes, hidden, _ = CARRIED[name]
    source = Checkpoint.open(tiny_model(**changes))
    assert torch.equal(logits(carried(source, hidden)), logits(source))


def test_fused_matrices_come_apart_in_order_and_lose_nothing(tiny_model: Make) -> None:
    """Put together again they are the originals; taken apart the model computes the same."""
    source = Checkpoint.open(tiny_model(**PHI3, num_key_value_heads=2))
    found = carried(source)
    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(3):
        for whole, parts in fused.items():
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            together = torch.cat([found.tensor(name) for name in names])
            assert torch.equal(together, source.tensor(f"model.layers.{layer}.{whole}.weight"))
    # Products with a part of a matrix may sum in another order: 1e-12 is float64's rounding.
    before, after = logits(source, torch.float64), logits(found, torch.float64)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2", "qwen2 of odd width"])
def test_a_bias_is_the_original_one_or_zero(name: str, tiny_model: Make) -> None:
    changes, hidden, _ = CARRIED[name]
    source = Checkpoint.open(tiny_model(**changes))
    found = carried(source, hidden)
    biases = {tensor for tensor in found.specs if tensor.endswith(".bias")}
    assert len(biases) == 3 * len("qkvo")
    for tensor in biases:
        ours = tensor.endswith("o_proj.bias")  # the class of the original has none there
        assert (tensor not in source.specs) == ours
        same = torch.zeros(found.specs[tensor].shape) if ours else source.tensor(tensor)
        assert torch.equal(found.tensor(tensor), same)


@pytest.mark.parametrize("tied", [False, True])
def test_multipliers_that_are_powers_of_two_go_into_the_weights_without_rounding(
    tied: bool, tiny_model: Make
) -> None:
    source = granite(tiny_model, (4.0, 0.5, 8.0), tied=tied)
    found = carried(source)
    neutral = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    assert [found.config[key] for key in neutral] == [1.0, 1.0, 1.0]
    assert found.config["attention_multiplier"] == source.config["attention_multiplier"]
    assert torch.equal(logits(found), logits(source))


@pytest.mark.parametrize("tied", [False, True])
def test_other_multipliers_cost_one_rounding_of_each_weight(tied: bool, tiny_model: Make) -> None:
    source = granite(tiny_model, (3.0, 0.22, 5.0), tied=tied)
    before, after = (logits(model, torch.float64) for model in (source, carried(source)))
    # Computed in float64, what is left is the float32 rounding of weights: 6e-8 of each, through
    # three layers. Without any one multiplier the logits are off by more than half.
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 1e-6 * before.abs().max()


def test_a_class_that_stays_is_handed_back_as_it_is(tiny_model: Make) -> None:
    folders = [tiny_model(model_type="llama"), tiny_model(**QWEN2 | WINDOW)]
    neutral = granite(tiny_model, (1.0, 1.0, 1.0), tied=False)
    for source in (neutral, *map(Checkpoint.open, folders)):
        decided = plan(source.config, SizeOptions(intermediate_size=80))
        checkpoint, same = carry(source, decided)
        assert checkpoint is source
        assert same is decided


@pytest.mark.parametrize(
    ("carriers", "hidden", "windowed", "taken"),
    [
        ((LLAMA, GRANITE), 72, False, LLAMA),
        ((GRANITE, LLAMA), 72, False, GRANITE),
        ((LLAMA, GRANITE), 40, False, GRANITE),  # six heads do not divide it, as Llama insists
        ((LLAMA,), 40, False, "Qwen2ForCausalLM"),
        ((LLAMA, GRANITE), 72, True, "Qwen2ForCausalLM"),  # neither has windows
        (("MistralForCausalLM",), 72, True, "Qwen2ForCausalLM"),  # it has windows, and no biases
        ((), 72, False, "Qwen2ForCausalLM"),
    ],
)
def test_the_first_carrier_that_holds_the_sizes_is_taken(
    carriers: tuple[str, ...], hidden: int, windowed: bool, taken: str, tiny_model: Make
) -> None:
    qwen2 = SUPPORTED["Qwen2ForCausalLM"]
    sizes = read_sizes(qwen2, Checkpoint.open(tiny_model(**ODD)).config)
    asked = replace(sizes, hidden_size=hidden, windowed=windowed)
    assert find_carrier(replace(qwen2, carriers=carriers), asked).architecture == taken


@pytest.mark.parametrize("on", [frozenset(), frozenset({"mlp_bias"})])
@pytest.mark.parametrize("carrier", [LLAMA, GRANITE])
def test_flags_of_a_carrier_cover_each_bias_of_the_original(
    carrier: str, on: frozenset[str], tiny_model: Make
) -> None:
    """Biases of query, key and value, which Qwen2 has without a flag, and those asked for."""
    qwen2, written = SUPPORTED["Qwen2ForCausalLM"], SUPPORTED[carrier]
    config = Checkpoint.open(tiny_model(**QWEN2)).config
    sizes = replace(read_sizes(qwen2, config), biases=on)
    assert carried_biases(qwen2, written, sizes) == {"attention_bias", *on}
    assert carried_biases(written, written, sizes) == on


def test_heads_that_are_rotated_in_part_are_refused(tiny_model: Make) -> None:
    source = Checkpoint.open(tiny_model(**PHI3))
    rope = source.config.get("rope_parameters", {}) | {"partial_rotary_factor": 0.75}
    config = {**source.config, "rope_parameters": rope}
    decided = plan(config, SizeOptions(intermediate_size=64))
    said = r"partial_rotary_factor 0\.75 is not supported: MistralForCausalLM, as which Phi3"
    with pytest.raises(UnsupportedModelError, match=said):
        carry(replace(source, config=config), decided)
    with pytest.raises(UnsupportedModelError, match=said):
        carry_config(config, decided)
