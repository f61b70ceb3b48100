"""How long narrowing takes: the operations that are counted are those that torch carries out, and
they grow with text and depth as the passes and sums do that they stand for.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dotexport.app.opening import open_source
from dotexport.axes.plan import Plan, SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.generation.own_text import sample_text
from dotexport.healing.distil import heal
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.models.checkpoint import Checkpoint
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.depth import Depths
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.sizes import effort
from dotexport.sizes.budget import plan
from dotexport.sizes.effort import (
    Work,
    allocation_seconds,
    rates,
    shrink_seconds,
    work_of,
    work_of_choosing_layers,
    work_of_context,
    work_of_distilling,
    work_of_sampling,
)

from ..conftest import LLAMAS

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
WINDOWS_NL = torch.randint(0, 90, (24, 64), generator=torch.Generator().manual_seed(0))
CUTS: dict[str, dict[str, Any]] = {
    "every axis": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1},
    "stream": {"hidden_size": 32, "tied": False},
    "MLP": {"intermediate_size": 40},
}


class Counted(TorchDispatchMode):
    """Multiplications and additions of all matrix products, by type; those of solves are none."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (packet := func.overloadpacket) in flop_registry:
            count = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.products[args[0].dtype] += count
        elif packet is torch.ops.aten.linear:  # whole where no gradient is possible
            self.products[args[0].dtype] += 2 * args[0].numel() * len(args[1])
        return out


def decided(**changes: Any) -> Plan:
    return plan(LLAMA_3_2_1B | changes, SizeOptions(params="0.7x"))


@pytest.mark.parametrize(
    ("cut", "samples", "seqlen"),
    [("every axis", 24, 64), ("stream", 24, 64), ("MLP", 24, 64), ("MLP", 2, 8)],
)
def test_products_of_a_run_are_those_that_are_counted(
    cut: str,
    samples: int,
    seqlen: int,
    tiny_llama: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = open_source(tiny_llama("square"))
    chosen = plan(source.config, SizeOptions(**CUTS[cut]))
    (tmp_path / "hf").mkdir()
    windows_NL = WINDOWS_NL[:samples, :seqlen]
    run = prepare(source, chosen, tmp_path, CalibrationText(windows_NL), NarrowOptions())
    # Of a fused attention torch's registry knows nothing on a CPU.
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        run.run()
    expected = work_of(chosen, samples, seqlen)
    # A backward pass is taken for two forward ones, though no gradient of inputs is asked for, and
    # attention for half of what the unfused one does.
    in_float32 = expected.passes + expected.products
    assert counted.products[torch.float32] == pytest.approx(in_float32, rel=0.25)
    # The same of a basis, whose loss asks for no gradient of moments. A fit tries as many strengths
    # of its ridge as it takes to get downhill: on noise more often than the usual four or fewer.
    assert counted.products[torch.float64] == pytest.approx(expected.sums, rel=0.25)


def test_the_products_of_a_sublayer_are_those_of_its_matrices_and_half_of_all_scores(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """The unfused attention computes the half that no token sees, too."""
    source = open_source(tiny_llama("wide-heads"))
    chosen = plan(source.config, SizeOptions(intermediate_size=88))
    run = prepare(source, chosen, tmp_path, CalibrationText(WINDOWS_NL), NarrowOptions())
    stream_NLD = torch.randn(*WINDOWS_NL.shape, 48, generator=torch.Generator().manual_seed(0))
    layer = run.original.layer(0)
    for sublayer in chosen.family.sublayers:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Counted() as counted:
            layer.after(sublayer, stream_NLD)
        site = effort._Site(chosen.family, sublayer, chosen.before, chosen.after, 24, 64)
        rows, inside = site._rows(chosen.before), site._inside(chosen.before)
        passes, unseen = site._pass(48, rows, inside).passes, site._mixing(inside)
        assert counted.products[torch.float32] == (passes + unseen) * WINDOWS_NL.numel()
        assert (unseen > 0) == (sublayer.module == "self_attn")


@pytest.mark.parametrize("layers", [3, 1])
def test_products_of_choosing_layers_are_those_that_are_counted(
    layers: int, tiny_llama: Callable[[str], Path]
) -> None:
    source = open_source(tiny_llama("square"))
    chosen = plan(source.config, SizeOptions(num_hidden_layers=layers))
    windows_NL = torch.randint(0, 90, (136, 64), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        Depths(
            source, CalibrationText(windows_NL, windows_NL.flip(0)), torch.device("cpu")
        ).settled(chosen)
    expected = work_of_choosing_layers(chosen, 64)
    # An average of what lies behind a candidate; attention for half of what the unfused one does.
    in_float32 = expected.passes + expected.products
    assert counted.products[torch.float32] == pytest.approx(in_float32, rel=0.25)
    assert counted.products[torch.float64] == pytest.approx(expected.sums, rel=0.25)


def test_products_of_a_sampled_token_are_those_that_are_counted() -> None:
    source = Checkpoint.open(MODEL_DIR)
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        sampled = sample_text(source, tokens=512, longest=128)
    expected = work_of_sampling(plan(source.config, SizeOptions(params="0.7x")), sampled.num_slots)
    # Of texts shorter than 512 tokens, attention costs less.
    in_float32 = (expected.passes + expected.products) / effort.LOCKSTEP
    assert counted.products[torch.float32] == pytest.approx(in_float32, rel=0.25)


def test_products_of_a_step_of_distillation_are_those_that_are_counted(
    tiny_llama: Callable[[str], Path], tiny_model: Callable[..., Path]
) -> None:
    """From a narrower model with random weights, which cost as much as any."""
    source = open_source(tiny_llama("many-tied-rows"))
    chosen = plan(source.config, SizeOptions(intermediate_size=64))
    sizes = {**LLAMAS["many-tied-rows"], "intermediate_size": 64}
    narrower = tiny_model(model_type="llama", **sizes)
    options = HealOptions(steps=2, every=2, batch=4, precision="fp32")
    text = HealingText(WINDOWS_NL[:20], WINDOWS_NL[20:])
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        heal(
            Checkpoint.open(narrower),
            source,
            torch.eye(64),
            text,
            options,
            device=torch.device("cpu"),
        )
    expected = work_of_distilling(chosen, options.settled(64), 4 * 64)
    # The distance of streams is not counted, attention for half of what the unfused one does.
    in_float32 = expected.passes + expected.products
    assert counted.products[torch.float32] == pytest.approx(in_float32, rel=0.1)


def test_measuring_cuts_costs_every_rehearsal_and_one_search_for_layers() -> None:
    """On less text than the narrowing itself, and without healing."""
    mlp, depth = (
        plan(LLAMA_3_2_1B, SizeOptions(**{key: size}))
        for key, size in (("intermediate_size", 6144), ("num_hidden_layers", 12))
    )
    context = work_of_context(mlp, 2 * effort.JUDGED).seconds(rates(2048))  # once for all
    once, twice, deep = (
        allocation_seconds(plans) - context for plans in ([mlp], [mlp, mlp], [mlp, mlp, depth])
    )
    assert 0 < once < shrink_seconds(mlp)
    assert twice == pytest.approx(2 * once, rel=1e-9)
    # On more text passes cost more, and solves the same.
    assert 2 * once < allocation_seconds([mlp], [mlp]) - context < 5 * once
    search = work_of_choosing_layers(depth, 512).seconds(rates(2048))
    assert deep - twice > search > 0
    assert allocation_seconds([]) == 0


def test_passes_and_sums_grow_with_text_and_solves_do_not() -> None:
    once, twice, thrice = (work_of(decided(), samples, 2048) for samples in (64, 128, 192))
    for kind in ("passes", "products", "moved"):
        first, second, third = (getattr(work, kind) for work in (once, twice, thrice))
        # Steps of healing are whole.
        assert third - second == pytest.approx(second - first, rel=1e-3)
        assert second > first
    # All of a pass is for tokens; what moves besides are tables of the vocabulary.
    assert twice.passes == pytest.approx(2 * once.passes, rel=0.01)
    assert twice.moved == pytest.approx(2 * once.moved, rel=0.1)
    assert twice.products == pytest.approx(2 * once.products, rel=1e-9)
    solves = [(work.sums, work.factors, work.eigen) for work in (once, twice)]
    assert solves[0] == solves[1]


def test_tokens_of_longer_windows_cost_more_in_attention_only() -> None:
    """The same text in windows twice as long."""
    short, long = work_of(decided(), 128, 1024), work_of(decided(), 64, 2048)
    assert short.passes < long.passes < 1.5 * short.passes
    assert (short.products, short.sums) == pytest.approx((long.products, long.sums), rel=1e-6)
    assert short.factors == long.factors


def test_healing_is_a_forward_and_a_backward_pass_over_what_is_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two passes more, through MLPs alone: no group leaves."""
    chosen = plan(LLAMA_3_2_1B, SizeOptions(hidden_size=1536, intermediate_size=6144))
    usual = work_of(chosen, 128, 2048)
    monkeypatch.setattr(effort, "LocalOptions", partial(LocalOptions, passes=4.0))
    more = work_of(chosen, 128, 2048).passes - usual.passes
    one = 16 * 3 * 2 * 1536 * 6144  # gate, up and down of all layers, a token
    assert more == pytest.approx(2 * 3 * (128 * 2048 * 7 / 8) * one, rel=1e-9)


def test_every_layer_adds_the_same() -> None:
    """From four layers on: before, the basis looks at fewer sites."""
    # Sizes of their own: a budget would cut models of other depths otherwise.
    asked = SizeOptions(hidden_size=1536, intermediate_size=6144)
    four, eight, twelve = (
        work_of(plan(LLAMA_3_2_1B | {"num_hidden_layers": layers}, asked), 64, 512)
        for layers in (4, 8, 12)
    )
    for first, second, third in zip(*map(astuple, (four, eight, twelve)), strict=True):
        # One multiplication more or less in double precision.
        assert third - second == pytest.approx(second - first, rel=1e-9)
    assert eight.passes > 1.5 * four.passes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [2048, 1024])
@pytest.mark.parametrize("mlp", [8192, 4096])
@pytest.mark.parametrize("groups", [8, 4])
def test_no_count_is_negative_and_what_is_left_alone_costs_no_search_and_no_healing(
    tied: bool, hidden: int, mlp: int, groups: int
) -> None:
    config = LLAMA_3_2_1B | {"tie_word_embeddings": tied}
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_key_value_heads": groups}
    work = work_of(plan(config, SizeOptions(**sizes)), 1, 2)
    assert min(astuple(work)) >= 0
    assert math.isfinite(sum(astuple(work)))
    assert (work.eigen > 0) == (hidden < 2048)  # there is a basis to be found
    if groups < 8:  # one that loses no group is not healed
        unhealed = work_of(plan(config, SizeOptions(**sizes | {"num_key_value_heads": 8})), 1, 2)
        assert work.passes > unhealed.passes


def test_time_is_the_sum_of_all_kinds_over_their_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(2.0, 6.0, 12.0, 20.0, 30.0, 42.0)
    per_second = Work(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert work.seconds(per_second) == 2 + 3 + 4 + 5 + 6 + 7
    assert (work * 3).seconds(per_second) == (work + work + work).seconds(per_second) == 81
    widths: list[int] = []
    monkeypatch.setattr(effort, "rates", lambda width, passes: widths.append(width) or per_second)
    expected = work_of(decided(), 7, 300) + work_of_sampling(decided(), 3 * 300)
    assert shrink_seconds(decided(), samples=7, seqlen=300) == expected.seconds(per_second)
    assert widths == [2048]  # matrices as wide as the original


def test_rates_are_those_of_matrices_here_and_measured_once_per_width() -> None:
    """Against one hundred products, timed here; a busy neighbour may well slow one of the two."""
    n, calls = 256, 100
    assert rates(n) is rates(n)
    assert rates(1) is rates(effort.LEAST_WIDTH)
    x_TN, w_NN = torch.randn(2048, n), torch.randn(n, n)
    started = time.process_time()
    for _ in range(calls):
        x_TN @ w_NN
    spent = (time.process_time() - started) / torch.get_num_threads()
    assert 0.25 < rates(n).passes / (calls * 2 * 2048 * n**2 / spent) < 4
    assert min(astuple(rates(n))) > 0
