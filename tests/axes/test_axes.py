"""Axes: what holds of each of them, and one that is planned, narrowed and reported on its way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes import AXES, axes_of
from dotexport.axes.axis import FLOOR, Axis
from dotexport.axes.carrying import planned_config
from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import SizeError, UsageError
from dotexport.models.checkpoint import read_config
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.sizes.budget import plan, within_budget

SMOLLM: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
FAMILY, WHOLE = read_model(SMOLLM)
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
}


# Every axis -------------------------------------------------------------------------------------

EVERY = [
    pytest.param(axis, config, id=f"{config['model_type']}-{axis.name}")
    for config in (SMOLLM, MIXTURE)
    for axis in axes_of(read_model(config)[1])
]
each_axis = pytest.mark.parametrize(("axis", "config"), EVERY)


def test_every_axis_is_one_of_some_model() -> None:
    assert {axis.name for axis in AXES} == {case.values[0].name for case in EVERY}


@pytest.mark.parametrize(("config", "strange"), [(SMOLLM, "experts"), (MIXTURE, "intermediate")])
def test_an_axis_that_a_model_lacks_is_refused(config: dict[str, Any], strange: str) -> None:
    [axis] = [axis for axis in AXES if axis.flag == strange]
    with pytest.raises(SizeError, match=f"--{strange} 64: .* has no {axis.name}"):
        plan(config, SizeOptions(sizes={axis.name: 64}))
    assert axis.name not in plan(config, SizeOptions(num_hidden_layers=2)).as_dict()


@each_axis
def test_a_size_that_is_set_is_the_size_that_is_read(axis: Axis, config: dict[str, Any]) -> None:
    family, whole = read_model(config)
    for size in axis.grids(family, whole)[-1]:
        assert axis.size(axis.resized(whole, size)) == size
    assert axis.resized(whole, axis.size(whole)) == whole


@each_axis
def test_grids_get_finer_and_hold_the_original(axis: Axis, config: dict[str, Any]) -> None:
    family, whole = read_model(config)
    grids = axis.grids(family, whole)
    for coarse, fine in itertools.pairwise(grids):
        assert set(coarse) < set(fine)
    assert all(sizes == sorted(sizes) and axis.size(whole) == sizes[-1] for sizes in grids)


@each_axis
def test_the_original_is_legal_and_more_of_it_is_refused(
    axis: Axis, config: dict[str, Any]
) -> None:
    family, whole = read_model(config)
    assert axis.problem(family, whole, whole) is None
    more = axis.resized(whole, axis.size(whole) + FLOOR)
    with pytest.raises(SizeError, match="more than the original's"):
        axis.check(family, whole, more)


@each_axis
def test_a_refusal_names_the_nearest_legal_sizes(axis: Axis, config: dict[str, Any]) -> None:
    family, whole = read_model(config)
    every = [axis.resized(whole, size) for size in range(1, axis.size(whole) + 1)]
    legal = [axis.size(s) for s in every if axis.problem(family, whole, s) is None]
    for after in every[:: max(1, len(every) // 40)]:
        size = axis.size(after)
        if size in legal:
            axis.check(family, whole, after)
            continue
        below = [s for s in legal if s < size][-1:]
        nearest = [*below, *[s for s in legal if s > size][:1]]
        with pytest.raises(SizeError, match=" and ".join(map(str, nearest)) + "$"):
            axis.check(family, whole, after)


@each_axis
def test_a_cut_strains_more_the_deeper_it_is_and_nothing_where_nothing_is_cut(
    axis: Axis, config: dict[str, Any]
) -> None:
    family, whole = read_model(config)
    sizes = [axis.resized(whole, size) for size in axis.grids(family, whole)[-1]]
    strains = [axis.strain(whole, after) for after in sizes]
    assert strains == sorted(strains, reverse=True)
    assert strains[-1] == 0


@each_axis
def test_a_cut_twice_as_deep_strains_four_times_as_much(axis: Axis, config: dict[str, Any]) -> None:
    _, whole = read_model(config)
    before, quarter_off, half_off = (axis.resized(whole, size) for size in (64, 48, 32))
    half, quarter = (axis.strain(before, after) for after in (half_off, quarter_off))
    assert half == pytest.approx(4 * quarter)
    assert quarter > 0


@pytest.mark.parametrize(("divides", "grain"), [(True, 72), (False, 8)])
def test_a_width_divides_over_the_heads_where_the_class_asks_for_it(
    divides: bool, grain: int
) -> None:
    """Of 9 heads; 8 is the grain of kernels."""
    [width] = [axis for axis in AXES if axis.name == "hidden_size"]
    family = replace(FAMILY, divides=divides, carriers=())
    sizes = [width.resized(WHOLE, size) for size in range(1, 576)]
    legal = [width.size(s) for s in sizes if width.problem(family, WHOLE, s) is None]
    assert legal == list(range(grain, 576, grain))


@each_axis
def test_config_json_says_the_sizes_that_the_plan_says(axis: Axis, config: dict[str, Any]) -> None:
    family, whole = read_model(config)
    size = axis.grids(family, whole)[0][0]
    after = axis.resized(whole, size)
    written = planned_config(config, Plan(family, whole, after))
    assert read_model(written)[1] == after


def test_shares_are_those_of_the_weights_that_are_counted_by_hand() -> None:
    hidden, mlp, heads, depth = (axis.shares(FAMILY, WHOLE) for axis in axes_of(WHOLE))
    layer = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    parameters = 30 * (layer + 2 * 576) + 49152 * 576 + 576
    assert hidden.parameters == 1  # every weight has it
    assert mlp.parameters == pytest.approx(30 * 3 * 576 * 1536 / parameters)
    assert heads.parameters == pytest.approx(30 * 576 * (2 * 576 + 2 * 192) / parameters)
    assert depth.parameters == pytest.approx(30 * (layer + 2 * 576) / parameters)
    assert (hidden.cache, mlp.cache, heads.cache, depth.cache) == (0, 0, 1, 1)
    products = 30 * layer + 49152 * 576
    assert mlp.time == pytest.approx(30 * 3 * 576 * 1536 / products)
    assert hidden.time == 1


# One of them, from a flag to a report ------------------------------------------------------------


def letters(folder: Path) -> Path:
    text = folder / "text.txt"
    words = " ".join(f"w{n * n % 87}" for n in range(6000))
    text.write_text(words, encoding="utf-8")
    return text


def test_an_axis_is_planned(tiny_llama: Callable[[str], Path]) -> None:
    config = read_config(tiny_llama("wide-heads"))
    decided = plan(config, SizeOptions(num_hidden_layers=2))
    assert decided.as_dict()["num_hidden_layers"] == [3, 2]
    assert decided.config(config)["num_hidden_layers"] == 2
    depths = {p.after.num_layers for p in within_budget(config, SizeOptions(params="0.7x"))}
    assert depths == {1, 2, 3}
    with pytest.raises(SizeError, match="--layers 4 is more than the original's 3"):
        plan(config, SizeOptions(num_hidden_layers=4))


def test_an_axis_is_a_flag_and_is_reported(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = str(tiny_llama("wide-heads")), tmp_path / "out"
    run = CliRunner(env={"COLUMNS": "200"})
    planned = run.invoke(app, ["plan", model, "--layers", "2", "--hidden", "40", "--json"])
    assert planned.exit_code == 0, planned.output
    file = tmp_path / "plan.json"
    file.write_text(planned.stdout, encoding="utf-8")
    assert json.loads(planned.stdout)["shrink"]["layers"] == 2
    shown = run.invoke(app, ["plan", model, "--layers", "2"]).stdout
    [axis] = [axis for axis in AXES if axis.flag == "layers"]
    assert "num_hidden_layers" in shown
    assert axis.exact in shown
    text = ["--calib", str(letters(tmp_path)), "--samples", "8", "--seqlen", "32"]
    made = run.invoke(app, ["shrink", model, "-o", str(out), "--plan", str(file), *text])
    assert made.exit_code == 0, made.output
    assert "num_hidden_layers" in made.stdout
    report = json.loads((out / "reports/shrink.json").read_text(encoding="utf-8"))
    assert report["sizes"]["num_hidden_layers"] == [3, 2]
    [left] = {0, 1, 2} - set(report["kept_layers"])
    assert {site["layer"] for site in report["sites"]} == {0, 1, 2, None} - {left}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| num_hidden_layers | 3 | 2 | 0.667x |" in card
    assert f"num_hidden_layers: without {left}" in card


def test_only_the_axes_that_are_named_share_a_budget(tiny_llama: Callable[[str], Path]) -> None:
    config = read_config(tiny_llama("wide-heads"))
    asked = SizeOptions(params="0.7x", axes="num_hidden_layers,intermediate_size")
    for found in within_budget(config, asked):
        assert found.after.hidden_size == found.before.hidden_size
        assert found.after.num_key_value_heads == found.before.num_key_value_heads
    assert {p.after.num_layers for p in within_budget(config, asked)} > {2}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"params": "0.7x", "axes": "depth"}, "--axes names 'depth'; expected some of hidden_size"),
        ({"axes": "hidden_size"}, "give --params 0.7x as well"),
    ],
)
def test_axes_that_cannot_be_meant_are_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SizeOptions(**asked)  # type: ignore[arg-type]


def test_a_budget_is_shared_by_measured_curves(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    text = TextOptions(source=str(letters(tmp_path)), samples=8, seqlen=32)
    options = ShrinkOptions(
        sizes=SizeOptions(params="0.8x"),
        text=text,
        narrow=NarrowOptions(local=None),
        allocate="measured",
    )
    shrunk = shrink(tiny_llama("wide-heads"), tmp_path / "out", options)
    assert shrunk.allocation is not None
    curves = {curve.axis: curve for curve in shrunk.allocation.curves}
    assert set(curves["num_hidden_layers"].sizes) > {3}
    assert all("num_hidden_layers" in row for row in shrunk.allocation.checked)


def test_sizes_by_name_are_checked_for_their_names() -> None:
    with pytest.raises(TypeError, match="'hiden_size' is no axis"):
        SizeOptions(hiden_size=40)
    assert SizeOptions(hidden_size=40, num_key_value_heads=None).sizes == {"hidden_size": 40}
    assert resized(WHOLE, {}) == WHOLE
