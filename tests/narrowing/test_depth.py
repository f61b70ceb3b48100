"""Which layers leave: judged as the whole model judges, and needless ones first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.healing.heal_options import HealOptions
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.depth import RIDGE, Depths, Front, Stack
from dotexport.narrowing.streams import inverse_rms
from dotexport.sizes.budget import plan

Tiny = Callable[..., Path]
SIX = {"model_type": "llama", "num_hidden_layers": 6}
WINDOWS_NL = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def depths(model: Path) -> Depths:
    return Depths(open_source(model), CalibrationText(WINDOWS_NL), CPU)


def planned(model: Path, layers: int) -> Plan:
    return plan(open_source(model).config, SizeOptions(num_hidden_layers=layers))


def silent(model: Path, layers: tuple[int, ...], folder: Path) -> Path:
    """A copy in which the writers of some layers write nothing."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    for layer in layers:
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            for name in [n for n in tensors if n.startswith(f"model.layers.{layer}.{writer}")]:
                tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    for file in model.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_layers_that_add_nothing_leave_first_and_cost_nothing(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    model = silent(tiny_model(**SIX), (2, 4), tmp_path / "silent")
    found = depths(model)
    assert found.settled(planned(model, 4)).kept_layers == [0, 1, 3, 5]
    # Fitting the writer in front anew answers with the weights it had.
    assert all(divergence < 1e-6 for divergence in found.divergences)


def test_the_order_is_one_however_far_it_is_asked_for(tiny_model: Tiny) -> None:
    model = tiny_model(**SIX)
    found = depths(model)
    five, three = (found.settled(planned(model, n)).kept_layers for n in (5, 3))
    assert set(three) < set(five)
    assert depths(model).settled(planned(model, 3)).kept_layers == three
    assert len(found.left) == 3
    assert found.settled(planned(model, 5)).kept_layers == five
    assert len(found.left) == 3


def test_a_search_says_how_many_layers_it_has_passed(tiny_model: Tiny) -> None:
    model, said = tiny_model(**SIX), []
    found = replace(depths(model), progress=lambda *told: said.append(told))
    found.settled(planned(model, 3))
    assert {stage for stage, _, _ in said} == {"choosing layers"}
    shares = [done / total for _, done, total in said]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 6 + 5 + 4  # every layer of every step
    assert shares[0] == 0
    assert shares[-1] < 1


def test_nothing_is_searched_where_every_layer_stays(tiny_model: Tiny) -> None:
    model = tiny_model(**SIX)
    decided = plan(open_source(model).config, SizeOptions(intermediate_size=64))
    found = depths(model)
    assert found.settled(decided) is decided
    assert found.left == []


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"mlp_bias": True, "attention_bias": True},
        {"model_type": "gemma2", "sliding_window": 8, "tie_word_embeddings": True},
        {"model_type": "phi3", "pad_token_id": 0},
    ],
    ids=["llama", "biased", "gemma2", "phi3"],
)
def test_a_candidate_is_judged_as_the_whole_model_without_it(
    kind: dict[str, Any], tiny_model: Tiny
) -> None:
    """The slow way: transformers' own model, a layer taken out, the writer before it refitted."""
    model = tiny_model(**SIX | kind)
    found = depths(model)
    stack = found._stack(planned(model, 5))
    [(left, divergence)] = stack.without(list(range(6)), [3]).items()
    assert left == 3

    original = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    tokens_NL = torch.cat([stack.fitted_NL, stack.judged_NL])
    judged = slice(len(stack.fitted_NL), None)
    with torch.inference_mode():
        theirs_BLV = original(input_ids=tokens_NL[judged]).logits
        _cut(original, stack, tokens_NL)
        ours_BLV = original(input_ids=tokens_NL[judged], use_cache=False).logits
    wanted = (
        kl_div(
            log_softmax(ours_BLV, -1), log_softmax(theirs_BLV, -1), reduction="sum", log_target=True
        )
        / ours_BLV[..., 0].numel()
    )
    assert divergence == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)


def _cut(original: Any, stack: Stack, tokens_NL: Tensor) -> None:
    """Layer 3 out of transformers' model, and the MLP's last matrix before it fitted anew."""
    states = original(input_ids=tokens_NL, output_hidden_states=True).hidden_states
    writer = original.model.layers[2].mlp.down_proj
    family = stack.original.family
    if family.rotates:
        seen: list[Tensor] = []
        hook = writer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        wrote: list[Tensor] = []
        after = writer.register_forward_hook(lambda module, args, out: wrote.append(out))
        original(input_ids=tokens_NL)
        hook.remove()
        after.remove()
        some = slice(len(stack.fitted_NL))
        before_NLD = states[3] - wrote[0]
        weight_NL1 = inverse_rms(states[4][some])
        inputs_NLI, prior_DI = seen[0], writer.weight.double()
        if writer.bias is not None:
            inputs_NLI = torch.nn.functional.pad(inputs_NLI, (0, 1), value=1.0)
            prior_DI = torch.column_stack([prior_DI, writer.bias.double()])
        inputs_TI = (inputs_NLI[some] * weight_NL1).flatten(0, 1)
        missing_TD = ((states[4] - before_NLD)[some] * weight_NL1).flatten(0, 1)
        moments = Moments.zeros(inputs_TI.shape[1], missing_TD.shape[1])
        moments.add(inputs_TI, missing_TD)
        fitted_DI = ridge_solve(moments, prior_DI, RIDGE).float()
        if writer.bias is not None:
            writer.bias.copy_(fitted_DI[:, -1])
            fitted_DI = fitted_DI[:, :-1]
        writer.weight.copy_(fitted_DI)
    del original.model.layers[3]
    for place, layer in enumerate(original.model.layers):
        layer.self_attn.layer_idx = place
    kinds = getattr(original.config, "layer_types", None)
    original.config.num_hidden_layers = 5
    if kinds:
        original.config.layer_types = [*kinds[:3], *kinds[4:]]


def test_the_repair_brings_the_stream_closer_to_what_lies_behind_the_cut(tiny_model: Tiny) -> None:
    stack = depths(tiny_model(**SIX))._stack(planned(tiny_model(**SIX), 5))
    some = slice(len(stack.fitted_NL))
    with torch.no_grad():
        front = Front(stack.original.layer(2), stack.streams[2], len(stack.fitted_NL))
        wanted_NLD = stack.streams[4]
        bare, repaired = (
            float((found_NLD - wanted_NLD)[some].square().sum())
            for found_NLD in (stack.streams[3], front.behind(wanted_NLD))
        )
    assert repaired < bare


def test_a_shallower_model_is_healed_by_distillation(tiny_model: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + n * n % 87) for n in range(2000)))
    options = ShrinkOptions(
        sizes=SizeOptions(num_hidden_layers=4),
        text=TextOptions(source=str(text), samples=12, seqlen=32),
        heal=HealOptions(steps=4, batch=2),
    )
    report = shrink(tiny_model(**SIX), tmp_path / "out", options).healing
    assert report is not None
    assert report["kl"][1] <= report["kl"][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
