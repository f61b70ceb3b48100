"""gpt-oss: sinks leave with their heads, experts have biases and clamped gates, files keep experts
together.

Shapes: E experts, T tokens, D width of the stream, I neurons of an expert, N windows, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import CheckpointError, SizeError, UnsupportedModelError
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, read_config
from dotexport.models.config_words import settled
from dotexport.models.families.gpt_oss import GPT_OSS
from dotexport.models.layers import Layer, Stock
from dotexport.models.shapes import num_parameters
from dotexport.narrowing import local
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.original import Original, embed
from dotexport.sizes.budget import plan, within_budget
from dotexport.targets.vllm_tokens import Vllm

from . import changed_models
from .changed_models import WINDOWS_NL, narrowed, rewritten

Tiny = Callable[..., Path]
E, D, A = 5, 48, 2
CPU = torch.device("cpu")
OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_local_experts": E,
    "num_experts_per_tok": A,
    "sliding_window": 16,
}
ATTENTION, MIXTURE = GPT_OSS.sublayers
logits = partial(changed_models.logits, tokens_BL=WINDOWS_NL[:4])
BARE, REFIT = NarrowOptions(local=None, refit=False), NarrowOptions(local=None)
BOTH = pytest.mark.parametrize("options", [BARE, REFIT], ids=["bare", "refit"])


# Sinks ------------------------------------------------------------------------------------------


def with_a_silent_group(tensors: dict[str, Tensor]) -> None:
    """The first KV group gives nothing; sinks of all heads differ by much."""
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        half = tensors[f"{prefix}.o_proj.weight"].shape[1] // 2
        tensors[f"{prefix}.o_proj.weight"][:, :half] = 0.0
        tensors[f"{prefix}.sinks"] = torch.tensor([4.0, -4.0, 2.0, -1.0])


@BOTH
def test_sinks_leave_with_the_heads_that_they_belong_to(
    options: NarrowOptions, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = rewritten(tiny_model(**OSS), tmp_path / "model", with_a_silent_group)
    narrowed(model, tmp_path / "out", options, num_key_value_heads=1)
    sinks = Checkpoint.open(tmp_path / "out/hf").tensor("model.layers.1.self_attn.sinks")
    assert sinks.tolist() == [2.0, -1.0]
    before, after = logits(model), logits(tmp_path / "out/hf")
    # What a refit finds is as exact as its ridge is small.
    tolerance = (1e-4, 1e-3)[options is REFIT]
    assert (before - after).abs().max() < tolerance * before.abs().max()


# The stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_directions_that_say_nothing_leave_without_a_trace_and_epsilon_stays(
    tied: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    """Eight directions that are no axes; with an epsilon that shows a factor of it."""
    random = torch.Generator().manual_seed(0)
    basis_DK = torch.linalg.qr(torch.randn(D, 40, generator=random))[0]
    project_DD = basis_DK @ basis_DK.T

    def silence(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("embed_tokens.weight", "down_proj", "down_proj_bias", "o_proj.bias")):
                tensors[name] = tensor @ project_DD
            if name.endswith("o_proj.weight"):
                tensors[name] = project_DD @ tensor
        if tied:  # else the head of the narrower model would have to be another table
            tensors["model.norm.weight"][:] = 1.0

    words = {"rms_norm_eps": 0.01, "tie_word_embeddings": tied}
    model = rewritten(tiny_model(**OSS | words), tmp_path / "model", silence)
    narrowed(model, tmp_path / "out", BARE, basis_DK.double().numpy(), hidden_size=40)
    assert read_config(tmp_path / "out/hf")["rms_norm_eps"] == 0.01
    before, after = logits(model), logits(tmp_path / "out/hf")
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


# Experts ----------------------------------------------------------------------------------------

IDLE = ([1, 3], [0, 4])  # of either layer


def without_tokens_for_some(tensors: dict[str, Tensor]) -> None:
    """By the bias of the router no token goes to the idle experts; these are the largest of all."""
    for layer, idle in enumerate(IDLE):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.router.bias"][idle] = -50.0
        tensors[f"{prefix}.experts.down_proj"][idle] *= 10.0


@BOTH
def test_experts_that_no_token_goes_to_leave_without_a_trace(
    options: NarrowOptions, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = rewritten(tiny_model(**OSS), tmp_path / "model", without_tokens_for_some)
    run = narrowed(model, tmp_path / "out", options, num_experts=E - len(IDLE[0]))
    kept = [record["experts"] for record in run.records if "experts" in record]
    assert kept == [sorted(set(range(E)) - set(idle)) for idle in IDLE]
    before, after = logits(model), logits(tmp_path / "out/hf")
    # Gates sum to 1 with or without them: what is left is the rounding of float32.
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    tensors = load_file(tmp_path / "out/hf/model.safetensors")
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if "layers.0.mlp" in n}
    prefix = "model.layers.0.mlp"
    assert shapes == {
        f"{prefix}.router.weight": (3, D),
        f"{prefix}.router.bias": (3,),
        f"{prefix}.experts.gate_up_proj": (3, D, 48),
        f"{prefix}.experts.gate_up_proj_bias": (3, 48),
        f"{prefix}.experts.down_proj": (3, 24, D),
        f"{prefix}.experts.down_proj_bias": (3, D),
    }


def test_where_a_token_has_one_expert_its_writer_and_bias_are_those_of_least_squares(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    """No other expert has a part in its tokens then, so one pass is the answer for all of them."""
    model = tiny_model(**OSS | {"num_experts_per_tok": 1, "num_hidden_layers": 1})
    options = NarrowOptions(local=None, ridge=0.0)
    run = narrowed(model, tmp_path / "out", options, num_experts=2)
    written = Original(
        Checkpoint.open(tmp_path / "out/hf"), GPT_OSS, run.after, run.stock, run.streams.device
    )
    original, student = run.original.layer(0), written.layer(0)
    embed(run.original.embedding(), run.streams, run.streams.original_NLD)
    with torch.no_grad():
        before_NLD = student.after(ATTENTION, run.streams.original_NLD)
        for sublayer in (ATTENTION, MIXTURE):
            run.streams.advance_original(partial(original.after, sublayer))
        fitted = [n for n in range(len(WINDOWS_NL)) if n not in run.streams.held_out]
        before_TD = before_NLD[fitted].flatten(0, 1)
        after_TD = run.streams.original_NLD[fitted].flatten(0, 1)
        normed_TD = student.normalise(MIXTURE, before_TD)
        routing = student.route(MIXTURE, normed_TD)
        for expert in range(2):
            tokens_T, gates_T1 = routing.to(expert)
            inside_TI = student.inside_expert(MIXTURE, expert, normed_TD[tokens_T])
            inside_TI = torch.nn.functional.pad(inside_TI, (0, 1), value=1.0) * gates_T1
            weight_T1 = 1 / after_TD[tokens_T].square().mean(-1, keepdim=True).sqrt()
            target_TD = (after_TD - before_TD)[tokens_T]
            wanted_ID = torch.linalg.lstsq(
                (inside_TI * weight_T1).double(), (target_TD * weight_T1).double()
            ).solution
            assert len(tokens_T) > 3 * inside_TI.shape[1]
            name = f"mlp.experts.{expert}.down_proj"
            found_DI = torch.column_stack(
                [student.tensor(f"{name}.{p}") for p in ("weight", "bias")]
            )
            # float32 sums of a few hundred tokens.
            torch.testing.assert_close(found_DI.T.double(), wanted_ID, rtol=1e-3, atol=1e-4)


def test_biases_of_a_mixture_are_refitted_and_healed(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed = []

    def noted(leaves: list[Tensor], *_: Any, **__: Any) -> local.Healed:
        healed.append(len(leaves))
        return local.Healed(0.0, 0.0, 0)

    monkeypatch.setattr(local, "heal", noted)
    model = tiny_model(**OSS | {"num_hidden_layers": 1})
    found = []
    for name, options in {"bare": BARE, "refit": NarrowOptions()}.items():
        sizes = {"hidden_size": 40, "num_experts": 4}
        narrowed(model, tmp_path / name, options, np.eye(D)[:, :40], **sizes)
        found.append(load_file(tmp_path / name / "hf/model.safetensors"))
    biases = [name for name in found[0] if ".mlp." in name and name.endswith("bias")]
    assert len(biases) == 3
    assert not [name for name in biases if torch.equal(found[0][name], found[1][name])]
    # Weight and bias of the router, and of three linears of each expert.
    assert healed == [2 + 4 * 6]


def test_fewer_neurons_of_experts_cost_less_when_they_are_chosen_and_refitted(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 16}
    fitted = narrowed(tiny_model(**OSS), tmp_path / "a", REFIT, **sizes)
    plain = narrowed(tiny_model(**OSS), tmp_path / "b", replace(BARE, mlp="select"), **sizes)
    assert fitted.divergence < plain.divergence
    assert read_config(tmp_path / "a/hf")["intermediate_size"] == 16


def largest_gate(layer: Layer, stream_NLD: Tensor) -> float:
    normed_TD = layer.normalise(MIXTURE, stream_NLD).flatten(0, 1)
    return float((normed_TD @ layer.tensor("mlp.experts.0.gate_proj.weight").T).max())


def test_gates_and_ups_beyond_the_limit_are_clamped_as_the_class_clamps_them(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    def grow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("gate_up_proj"):
                tensors[name] *= 20.0

    model = rewritten(tiny_model(**OSS), tmp_path / "model", grow)
    source = open_source(model)
    stock = Stock.of(source.config, CPU)
    original = Original(source, *read_model(source.config), stock, CPU)
    stream_NLD, largest = original.embedding()[WINDOWS_NL[:4]], 0.0
    with torch.inference_mode():
        for number in range(2):
            layer = original.layer(number)
            largest = max(largest, largest_gate(layer, layer.after(ATTENTION, stream_NLD)))
            stream_NLD = layer.through(stream_NLD)
        found_NLV = stock.norm(CPU)(stream_NLD) @ original.folded_head().T
    assert largest > 7.0  # else nothing is clamped
    torch.testing.assert_close(found_NLV, logits(model), rtol=1e-4, atol=1e-3)


def test_as_many_experts_stay_as_a_token_goes_to(tiny_model: Tiny) -> None:
    config = read_config(tiny_model(**OSS))
    with pytest.raises(SizeError, match="--experts 1 is not between the 2 that each token"):
        plan(config, SizeOptions(num_experts=1))
    written = plan(config, SizeOptions(num_experts=3)).config(config)
    assert written["num_local_experts"] == written["num_experts"] == 3
    found = within_budget(config, SizeOptions(params="0.7x"))
    assert {p.after.num_experts for p in found} > {3, 4}


# Files and words --------------------------------------------------------------------------------


def test_files_are_written_as_they_were_read(tiny_model: Tiny, tmp_path: Path) -> None:
    source = open_source(tiny_model(**OSS))
    writer = CheckpointWriter(tmp_path, source.specs)
    for name in reversed(list(source.specs)):  # the order of writing is free
        writer.write(name, source.tensor(name))
    writer.finish()
    written = load_file(tmp_path / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for file in set(source.files.values()):
        stored |= load_file(file)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    whole_EDX = stored["model.layers.1.mlp.experts.gate_up_proj"]
    up_ID = source.tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert torch.equal(up_ID, whole_EDX[3, :, 1::2].T)


def test_files_with_another_number_of_experts_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    model = rewritten(tiny_model(**OSS), tmp_path / "model", lambda tensors: None)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_local_experts": E - 1}))
    with pytest.raises(CheckpointError, match=r"where config\.json says 4 experts"):
        _ = open_source(model).specs


def published(**words: Any) -> dict[str, Any]:
    """config.json of the model of 20 B, or of 120 B with other words."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        **words,
    }


def test_published_models_have_the_parameters_that_are_published() -> None:
    """Table 1 of the model card, arXiv 2508.10925: 20.91 and 116.83 billion."""
    large = {"num_hidden_layers": 36, "num_local_experts": 128}
    counts = [num_parameters(*read_model(settled(published(**w), of="here"))) for w in ({}, large)]
    assert [round(count / 1e9, 2) for count in counts] == [20.91, 116.83]


def test_words_that_the_class_takes_for_granted_are_said() -> None:
    found = settled(published(), of="here")
    assert found["attention_bias"] is True
    assert found["layer_types"][:3] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert found["rope_scaling"]["rope_type"] == "yarn"
    assert found["rope_theta"] == 150000
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor = 0\.5"):
        settled(published(partial_rotary_factor=0.5), of="here")


def test_weights_of_four_bits_are_refused_with_a_way_to_the_float_ones() -> None:
    config = settled(published(quantization_config={"quant_method": "mxfp4"}), of="here")
    with pytest.raises(UnsupportedModelError, match="already quantised") as caught:
        read_model(config)
    assert caught.value.exit_code == 5
    assert "Mxfp4Config(dequantize=True)" in str(caught.value)


def test_vllm_has_some_words_of_this_class_in_its_code(tiny_model: Tiny) -> None:
    config = settled(published(), of="here")
    asked = SizeOptions(hidden_size=2048, num_experts=24, num_key_value_heads=4)
    assert Vllm().config_problems(plan(config, asked).config(config), "fp32") == []
    [problem] = Vllm().config_problems({**config, "rms_norm_eps": 1e-3}, "fp32")
    assert "takes rms_norm_eps for 1e-05, not for 0.001" in problem
    fewer = plan(config, SizeOptions(num_hidden_layers=23)).config(config)
    [problem] = Vllm().config_problems(fewer, "fp32")
    assert "every second layer" in problem
