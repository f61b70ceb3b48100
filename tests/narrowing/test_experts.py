"""Mixtures of experts: who leaves is who counts least, and what the others are fitted to.

Shapes: N windows, L tokens per window, T tokens, E experts, A experts of a token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.axes.plan import SizeOptions
from dotexport.errors import SizeError
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.models.families import find_family
from dotexport.models.families.qwen3_moe import QWEN3_MOE
from dotexport.models.layers import Layer
from dotexport.models.shapes import num_parameters, read_sizes
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.experts import saliencies
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.original import embed
from dotexport.narrowing.prepare import prepare
from dotexport.narrowing.run import Narrowing
from dotexport.sizes.budget import plan, within_budget

from ..models import changed_models
from ..models.changed_models import WINDOWS_NL, narrowed, rewritten

TinyModel = Callable[..., Path]
E, D, A = 5, 48, 2
QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": E,
    "num_experts_per_tok": A,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
SHARING: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": E,
    "num_experts_per_tok": A,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
# Its shared expert counts whole, and files keep experts together under other names.
WHOLE: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 2,
    "layer_types": ["mamba", "attention"],
    "num_local_experts": E,
    "num_experts_per_tok": A,
    "intermediate_size": 24,
    "shared_intermediate_size": 20,
}
TOGETHER = ("mlp.experts.down_proj", "block_sparse_moe.output_linear.weight")
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.router.layer.weight")
WRITERS = (
    "o_proj.weight",
    "out_proj.weight",
    "down_proj.weight",
    "shared_mlp.output_linear.weight",
)
ATTENTION, MIXTURE = QWEN3_MOE.sublayers
logits = partial(changed_models.logits, tokens_BL=WINDOWS_NL[:4])
BARE = NarrowOptions(local=None, refit=False)


def kept_experts(run: Narrowing) -> list[list[int]]:
    return [record["experts"] for record in run.records if "experts" in record]


IDLE = ([1, 3], [0, 4])  # of either layer


def without_tokens_for_some(tensors: dict[str, Tensor]) -> None:
    """One axis of the stream is the same number everywhere, and routers read from it that no
    token goes to the idle experts. These are the largest of all."""
    tensors["model.embed_tokens.weight"][:, 0] = 0.5
    for name in tensors:
        if name.endswith(WRITERS):
            tensors[name][0] = 0.0
        elif name.endswith(TOGETHER):
            tensors[name][:, 0] = 0.0
    for layer, idle in enumerate(IDLE):
        prefix = f"model.layers.{layer}"
        [router_ED] = [tensors[name] for n in ROUTERS if (name := f"{prefix}.{n}") in tensors]
        together = next(
            (tensors[name] for n in TOGETHER if (name := f"{prefix}.{n}") in tensors), None
        )
        offset = f"{prefix}.{TOGETHER[0]}" in tensors  # that class multiplies with 1 + weight
        tensors[f"{prefix}.post_attention_layernorm.weight"][0] = 1.0 - offset
        router_ED[:, 0] = 0.0
        router_ED[idle, 0] = -30.0
        for expert in idle:
            apart = tensors.get(f"{prefix}.mlp.experts.{expert}.down_proj.weight")
            (apart if together is None else together[expert])[1:] *= 10.0  # type: ignore[index]


@pytest.mark.parametrize("options", [BARE, NarrowOptions(local=None)], ids=["bare", "refit"])
@pytest.mark.parametrize("words", [QWEN, SHARING, WHOLE], ids=["alone", "shared", "whole"])
def test_experts_that_no_token_goes_to_leave_without_a_trace(
    words: dict[str, Any], options: NarrowOptions, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = rewritten(tiny_model(**words), tmp_path / "model", without_tokens_for_some)
    run = narrowed(model, tmp_path / "out", options, num_experts=E - len(IDLE[0]))
    assert kept_experts(run) == [sorted(set(range(E)) - set(idle)) for idle in IDLE]
    before, after = logits(model), logits(tmp_path / "out/hf")
    # Gates sum to 1 with or without them: what is left is the rounding of float32.
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_an_expert_that_counts_does_not_leave_without_a_trace(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Else the test above would pass whoever leaves."""
    model = rewritten(tiny_model(**QWEN), tmp_path / "model", without_tokens_for_some)
    narrowed(model, tmp_path / "out", BARE, num_experts=E - len(IDLE[0]) - 1)
    before, after = logits(model), logits(tmp_path / "out/hf")
    assert (before - after).abs().max() > 0.05 * before.abs().max()


def slowly(layer: Layer, stream_TD: Tensor, *, normalised: bool) -> Tensor:
    """Saliencies token by token, from the formula."""
    weights = {name: tensor.double() for name, tensor in layer.tensors().items()}
    sums, counts = [0.0] * E, [0] * E
    for token_D in layer.normalise(MIXTURE, stream_TD).double():
        gates_E = torch.softmax(weights["mlp.gate.weight"] @ token_D, 0)
        chosen = sorted(range(E), key=lambda expert: -float(gates_E[expert]))[:A]
        total = sum(float(gates_E[expert]) for expert in chosen) if normalised else 1.0
        for expert in chosen:
            gate_ID, up_ID, down_DI = (
                weights[f"mlp.experts.{expert}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            )
            given_D = down_DI @ (silu(gate_ID @ token_D) * (up_ID @ token_D))
            sums[expert] += float(gates_E[expert]) / total * float(given_D.norm())
            counts[expert] += 1
    return torch.tensor([a / max(n, 1) for a, n in zip(sums, counts, strict=True)]).double()


@pytest.mark.parametrize("normalised", [True, False])
def test_saliencies_are_the_means_of_gate_times_size_over_the_tokens_of_an_expert(
    normalised: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(**QWEN | {"norm_topk_prob": normalised})
    source = open_source(model)
    (tmp_path / "hf").mkdir()
    run = prepare(
        source,
        plan(source.config, SizeOptions(num_experts=E)),
        tmp_path,
        CalibrationText(WINDOWS_NL),
        BARE,
    )
    layer = run.original.layer(0)
    embed(run.original.embedding(), run.streams, run.streams.original_NLD)
    with torch.no_grad():
        run.streams.advance_original(partial(layer.after, ATTENTION))
        found_E = saliencies(layer, MIXTURE, run.streams)
        slow_E = slowly(layer, run.streams.original_NLD.flatten(0, 1), normalised=normalised)
    # Products are float32 in the one and float64 in the other.
    torch.testing.assert_close(found_E, slow_E, rtol=1e-5, atol=0.0)
    assert len(set(found_E.tolist())) == E


def test_qwen3_5_35b_is_counted_as_torch_counts(tiny_model: TinyModel) -> None:
    """The defaults of its class; published as 35 B."""
    tiny_model(**SHARING)  # skips where the class is not known
    config = AutoConfig.for_model("qwen3_5_moe_text")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    words = config.to_dict() | {"architectures": [type(model).__name__]}
    count = num_parameters(family := find_family(words), read_sizes(family, words))
    assert count == sum(p.numel() for p in model.parameters()) == 34_660_610_688


def test_a_shared_expert_stays_and_is_fitted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """It answers for what leaves where all tokens are: fitted alone, it makes up for some of it."""
    model = tiny_model(**SHARING)
    run = narrowed(model, tmp_path / "out", NarrowOptions(local=None), num_experts=2)
    bare = narrowed(model, tmp_path / "bare", BARE, num_experts=2)
    assert run.divergence < bare.divergence
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    before, plain, after = (
        Checkpoint.open(folder).tensor(name)
        for folder in (model, tmp_path / "bare/hf", tmp_path / "out/hf")
    )
    assert torch.equal(before, plain)
    assert before.shape == after.shape
    assert not torch.equal(before, after)
    config = read_config(tmp_path / "out/hf")
    assert (config["num_experts"], config["shared_expert_intermediate_size"]) == (2, 20)


def test_the_refit_of_experts_lowers_the_error_on_held_out_windows(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    run = narrowed(tiny_model(**QWEN), tmp_path / "out", NarrowOptions(local=None), num_experts=3)
    sites = [record for record in run.records if record["site"] == "mlp.experts"]
    assert len(sites) == 2
    assert all(site["error"] < site["analytic_error"] for site in sites)
    bare = narrowed(tiny_model(**QWEN), tmp_path / "bare", BARE, num_experts=3)
    assert run.divergence < bare.divergence
    for site in (record for record in bare.records if record["site"] == "mlp.experts"):
        assert site["error"] == pytest.approx(site["analytic_error"])


def test_where_a_token_has_one_expert_each_writer_is_the_answer_of_least_squares(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """No other expert has a part in its tokens then, so one pass is the answer for all of them."""
    model = tiny_model(**QWEN | {"num_experts_per_tok": 1, "num_hidden_layers": 1})
    options = NarrowOptions(local=None, ridge=0.0)
    run = narrowed(model, tmp_path / "out", options, num_experts=2)
    [kept] = kept_experts(run)
    original = run.original.layer(0)
    embed(run.original.embedding(), run.streams, run.streams.original_NLD)
    student = Layer(run.stock, QWEN3_MOE, 0, written(tmp_path / "out/hf"))
    with torch.no_grad():
        before_NLD = student.after(ATTENTION, run.streams.original_NLD)
        for sublayer in (ATTENTION, MIXTURE):
            run.streams.advance_original(partial(original.after, sublayer))
        fitted = [n for n in range(len(WINDOWS_NL)) if n not in run.streams.held_out]
        before_TD = before_NLD[fitted].flatten(0, 1)
        after_TD = run.streams.original_NLD[fitted].flatten(0, 1)
        normed_TD = student.normalise(MIXTURE, before_TD)
        routing = student.route(MIXTURE, normed_TD)
        for expert in range(len(kept)):
            tokens_T, gates_T1 = routing.to(expert)
            inside_TI = student.inside_expert(MIXTURE, expert, normed_TD[tokens_T]) * gates_T1
            weight_T1 = 1 / after_TD[tokens_T].square().mean(-1, keepdim=True).sqrt()
            target_TD = (after_TD - before_TD)[tokens_T]
            wanted_ID = torch.linalg.lstsq(
                (inside_TI * weight_T1).double(), (target_TD * weight_T1).double()
            ).solution
            found_DI = student.tensor(f"mlp.experts.{expert}.down_proj.weight").double()
            assert len(tokens_T) > 3 * inside_TI.shape[1]
            # float32 sums of a few hundred tokens.
            torch.testing.assert_close(found_DI.T, wanted_ID, rtol=1e-3, atol=1e-4)


def written(folder: Path) -> dict[str, Tensor]:
    prefix = "model.layers.0."
    tensors = load_file(folder / "model.safetensors")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_fewer_neurons_of_experts_cost_less_when_they_are_chosen_and_refitted(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    sizes = {"moe_intermediate_size": 16}
    fitted = narrowed(tiny_model(**QWEN), tmp_path / "a", NarrowOptions(local=None), **sizes)
    options = NarrowOptions(local=None, refit=False, mlp="select")
    plain = narrowed(tiny_model(**QWEN), tmp_path / "b", options, **sizes)
    assert fitted.divergence < plain.divergence
    assert read_config(tmp_path / "a/hf")["moe_intermediate_size"] == 16


def test_as_many_experts_stay_as_a_token_goes_to(tiny_model: TinyModel) -> None:
    config = read_config(tiny_model(**QWEN))
    with pytest.raises(
        SizeError, match="--experts 1 is not between the 2 that each token"
    ) as caught:
        plan(config, SizeOptions(num_experts=1))
    assert str(caught.value).endswith("the nearest legal: 2")
    written = plan(config, SizeOptions(num_experts=2)).config(config)
    # Releases of transformers read one or the other.
    assert written["num_experts"] == written["num_local_experts"] == 2


def test_a_budget_is_shared_with_experts(tiny_model: TinyModel) -> None:
    config = read_config(tiny_model(**QWEN))
    found = within_budget(config, SizeOptions(params="0.7x"))
    assert {p.after.num_experts for p in found} > {3, 4}
    assert all(p.ratio <= 0.7 for p in found)
    decided = plan(config, SizeOptions(params="0.83x", axes="num_experts"))
    assert (decided.after.num_experts, decided.after.hidden_size) == (3, 48)
