"""Gemma 4: layers with inputs of their own, keys of other layers, and two widths of heads and MLPs.

Shapes: B texts, L tokens, V vocabulary, K tokens that stay, X features of the table for all layers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dotexport import embedded
from dotexport.app.cli import app
from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import CheckpointError, SizeError, UnsupportedModelError
from dotexport.generation.second_text import NONE
from dotexport.healing.heal_options import HealOptions
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.config_words import settled
from dotexport.models.families import find_family
from dotexport.models.loading import Loaded
from dotexport.models.shapes import cached_numbers, num_multiplications, num_parameters, shapes
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.run import Narrowing
from dotexport.sizes.budget import plan
from dotexport.sizes.latency import Clock

from .changed_models import TOKENS_BL, letters, logits, rewritten

SLIDING, FULL = "sliding_attention", "full_attention"

Tiny = Callable[..., Path]


@pytest.fixture
def gemma(tiny_model: Tiny) -> Tiny:
    return lambda **changes: tiny_model(model_type="gemma4_text", **changes)


# Counting -----------------------------------------------------------------------------------------


def test_parameters_are_those_of_torch_and_factors_of_layers_are_none(gemma: Tiny) -> None:
    folder = gemma()
    model = AutoModelForCausalLM.from_pretrained(folder)
    family, sizes = read_model(open_source(folder).config)
    assert num_parameters(family, sizes) == model.num_parameters()
    listed = sum(torch.Size(shape).numel() for _, shape in shapes(family, sizes))
    assert listed == model.num_parameters() + sizes.num_layers


def test_products_are_those_of_matrices_and_not_of_tables(gemma: Tiny) -> None:
    family, sizes = read_model(open_source(gemma()).config)
    every = {name: shape for name, shape in shapes(family, sizes) if len(shape) == 2}
    for table in family.row_tables[::2]:  # that of the embedding, and that of layers
        del every[table]
    assert num_multiplications(family, sizes) == sum(a * b for a, b in every.values())


def test_only_layers_with_keys_of_their_own_keep_them(gemma: Tiny) -> None:
    family, sizes = read_model(open_source(gemma()).config)
    # Sliding, full, sliding; then two that look at these.
    assert cached_numbers(family, sizes) == 2 * 2 * (32 + 48 + 32)


# config.json --------------------------------------------------------------------------------------


def test_heads_that_see_everything_are_said_in_one_word(gemma: Tiny) -> None:
    folder = gemma()
    by_layer = json.loads((folder / "config.json").read_text())
    config = open_source(folder).config
    assert by_layer["per_layer_config"] == {n: {"head_dim": 48} for n in "134"}
    assert "per_layer_config" not in config
    assert config["global_head_dim"] == 48
    assert settled(config, of="here") == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, "enable_moe_block"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input"),
        ({"vocab_size_per_layer_input": 80}, "vocab_size_per_layer_input = 80"),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    ],
)
def test_what_the_table_does_not_describe_is_refused_by_its_name(
    gemma: Tiny, words: dict[str, Any], said: str
) -> None:
    config = json.loads((gemma() / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        find_family(settled(config | words, of="here"))
    assert caught.value.exit_code == 5


def test_keys_of_layers_that_are_not_there_are_refused(gemma: Tiny) -> None:
    config = json.loads((gemma() / "config.json").read_text())
    with pytest.raises(CheckpointError, match="num_kv_shared_layers = 4"):
        settled(config | {"num_kv_shared_layers": 4}, of="here")


# What can leave -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "size", "whole"),
    [("num_key_value_heads", 1, 2), ("num_hidden_layers", 4, 5)],
)
def test_what_other_layers_need_is_refused_by_name_and_left_whole_by_a_budget(
    gemma: Tiny, axis: str, size: int, whole: int
) -> None:
    config = open_source(gemma()).config
    with pytest.raises(SizeError, match=f"Gemma4ForCausalLM.*nearest legal: {whole}$") as caught:
        plan(config, SizeOptions(sizes={axis: size}))
    assert caught.value.exit_code == 5
    found = plan(config, SizeOptions(params="0.7x")).sizes()
    assert found[axis] == whole
    assert found["intermediate_size"] < 88
    assert found["hidden_size"] < 48


def test_copies_of_neurons_leave_without_a_trace(gemma: Tiny, tmp_path: Path) -> None:
    """In MLPs of either width."""

    def with_copies(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                kept = len(tensor) * 64 // 88
                tensor[kept:] = tensor[: len(tensor) - kept]

    folder = rewritten(gemma(), tmp_path / "model", with_copies)
    options = ShrinkOptions(
        text=letters(tmp_path),
        sizes=SizeOptions(intermediate_size=64),
        narrow=NarrowOptions(refit=False, local=None),
    )
    shrink(folder, tmp_path / "out", options, device="cpu")
    before, after = logits(folder), logits(tmp_path / "out/hf")
    # Weights move onto the copies by solves in float64, damped by 1e-9; sums are float32.
    assert (before - after).abs().max() < 1e-4 * float(before.abs().max())
    tensors = Checkpoint.open(tmp_path / "out/hf").specs
    widths = [tensors[f"model.layers.{n}.mlp.down_proj.weight"].shape[1] for n in range(5)]
    assert widths == [64, 64, 64, 128, 128]


def test_a_budget_is_measured_with_what_lies_beside_the_stream(gemma: Tiny, tmp_path: Path) -> None:
    """Sizes are searched by rehearsals, which weigh tokens by what they owe to context."""
    options = ShrinkOptions(
        text=letters(tmp_path),
        sizes=SizeOptions(params="0.9x"),
        narrow=NarrowOptions(local=None),
    )
    made = shrink(gemma(), tmp_path / "out", options, device="cpu")
    assert made.plan.ratio <= 0.9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert model.num_parameters() == made.plan.parameters_after


def test_a_run_that_was_stopped_goes_on_with_what_lies_beside_the_stream(
    gemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ShrinkOptions(
        text=letters(tmp_path),
        other=NONE,
        sizes=SizeOptions(hidden_size=40, intermediate_size=64),
        narrow=NarrowOptions(local=None, basis="select"),
    )
    right = shrink(gemma(), tmp_path / "right", options, device="cpu").out
    narrowed = Narrowing._layer

    def stopping(self: Narrowing, number: int, *asked: Any) -> None:
        if number == 4:  # of which the keys are those of layer 1
            raise KeyboardInterrupt
        narrowed(self, number, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(Narrowing, "_layer", stopping)
        with pytest.raises(KeyboardInterrupt):
            shrink(gemma(), tmp_path / "out", options, device="cpu")
    out = shrink(gemma(), tmp_path / "out", options, device="cpu").out
    found, wanted = Checkpoint.open(out / "hf"), Checkpoint.open(right / "hf")
    assert found.specs == wanted.specs
    assert all(torch.equal(found.tensor(name), wanted.tensor(name)) for name in wanted.specs)


def test_a_token_is_timed_with_what_lies_beside_the_stream(gemma: Tiny) -> None:
    """Of its kinds of layers this model has some only."""
    config = open_source(gemma()).config
    whole, half = (plan(config, SizeOptions(intermediate_size=size)) for size in (88, 40))
    ratio = Clock.of(config, whole, [whole, half]).ratio(half)
    assert 0 < ratio < float("inf")


def test_streamed_part_by_part_it_is_the_model(gemma: Tiny) -> None:
    loaded = Loaded(Checkpoint.open(gemma()), whole=False)
    assert torch.equal(loaded.logits(TOKENS_BL), logits(gemma()))


def test_it_learns_from_its_original_and_keeps_the_factors_of_layers(
    gemma: Tiny, tmp_path: Path
) -> None:
    made = shrink(
        gemma(),
        tmp_path / "out",
        ShrinkOptions(
            text=replace(letters(tmp_path), samples=2),
            sizes=SizeOptions(intermediate_size=40),
            narrow=NarrowOptions(local=None),
            heal=HealOptions(steps=30, every=10, batch=1, precision="fp32"),
        ),
        device="cpu",
    )
    assert made.healing is not None
    losses = [point["loss"] for point in made.healing["curve"][1:]]
    assert losses[-1] < losses[0]
    before, after = Checkpoint.open(gemma()), Checkpoint.open(made.out / "hf")
    for layer in range(5):
        name = f"model.layers.{layer}.layer_scalar"
        assert torch.equal(after.tensor(name), before.tensor(name))
        assert not torch.equal(before.tensor(name), torch.ones(1))


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("narrower", ["", "--intermediate 64"])
def test_both_tables_lose_the_same_rows(gemma: Tiny, tmp_path: Path, narrower: str) -> None:
    rows = json.loads((embedded.MODEL_DIR / "config.json").read_text())["vocab_size"]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    sizes = {"vocab_size": rows, "vocab_size_per_layer_input": rows}
    folder = rewritten(gemma(**sizes), tmp_path / "model", lambda _: None, **ids)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded.MODEL_DIR / name, folder / name)
    text = "--calib embedded:calibration --other embedded:evaluation --samples 8 --seqlen 64"
    run, out = CliRunner(), tmp_path / "out"
    asked = f"shrink {folder} -o {out} --vocab 512 {narrower} {text} --heal none"
    made = run.invoke(app, asked)
    assert made.exit_code == 0, made.output
    assert run.invoke(app, ["verify", str(out)]).exit_code == 0
    config = json.loads((out / "hf/config.json").read_text())
    assert (config["vocab_size"], config["vocab_size_per_layer_input"]) == (512, 512)
    kept_K = json.loads((out / "reports/vocabulary.json").read_text())["original_ids"]
    table = "model.embed_tokens_per_layer.weight"
    before, after = Checkpoint.open(folder), Checkpoint.open(out / "hf")
    assert torch.equal(after.tensor(table), before.tensor(table)[kept_K])
    model: Any = AutoModelForCausalLM.from_pretrained(out / "hf")
    record = json.loads((out / "dotexport.json").read_text())
    assert record["sizes"]["parameters"][1] == model.num_parameters()
    if not narrower:
        whole: Any = AutoModelForCausalLM.from_pretrained(folder)
        new_BL = torch.randint(512, (1, 40), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            wanted_BLV = whole(input_ids=torch.tensor(kept_K)[new_BL]).logits[..., kept_K]
            found_BLV = model(input_ids=new_BL).logits
        # Fewer columns in one product, summed in float32.
        torch.testing.assert_close(found_BLV, wanted_BLV, rtol=1e-5, atol=1e-5)
