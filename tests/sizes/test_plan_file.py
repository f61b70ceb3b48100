"""A plan in a file is an order for one model: what the verb prints gives shrink the same sizes
again, and a plan of another model, or one that somebody edited, is refused by name before any
weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.app.recipe import Recipe
from dotexport.axes.plan import SizeOptions
from dotexport.errors import CheckpointError, SizeError, UsageError
from dotexport.models.checkpoint import read_config
from dotexport.models.config_words import settled
from dotexport.sizes.budget import plan
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.plan_file import fingerprint, on_a_command_line, read_plan
from dotexport.sizes.planning import choose

# As it is read: what the class takes for granted is said.
CONFIG: dict[str, Any] = settled(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    of="the test",
)
SIZES = SizeOptions(
    hidden_size=192, intermediate_size=512, num_key_value_heads=3, num_hidden_layers=3
)
# What people add to a budget -> the switches that the sizes alone do not say.
SWITCHES: dict[str, dict[str, bool]] = {
    "": {},
    "--untied": {"tied": False},
    "--bias": {"bias": True},
    "--square": {"square": True},
    "--untied --bias --square": {"tied": False, "bias": True, "square": True},
}


def sized(flags: dict[str, Any]) -> SizeOptions:
    """Flags of a plan as the verb shrink reads them."""
    recipe = Recipe.parse({"model": "m", "shrink": {"calib": "c", **flags}}, "recipe")
    assert recipe.shrink is not None
    return recipe.shrink.options().sizes


def planned(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """A sound plan for CONFIG in a file, or what a hand made of one."""
    document = choose(CONFIG, SIZES, Deployment()).as_dict()
    if change is not None:
        change(document)
    file = folder / "plan.json"
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize("switches", SWITCHES)
def test_what_the_verb_prints_is_read_back_as_the_same_plan(switches: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["plan", str(tmp_path), "--params", "0.7x", *switches.split(), "--json"]
    file = tmp_path / "plan.json"
    file.write_text(CliRunner().invoke(app, arguments).stdout)
    flags = read_plan(file, read_config(tmp_path))
    asked = SizeOptions(params="0.7x", **SWITCHES[switches])
    assert plan(CONFIG, sized(flags)) == choose(CONFIG, asked, Deployment()).plan
    assert {key: flags[key] for key in flags if type(flags[key]) is bool} == SWITCHES[switches]


@pytest.mark.parametrize("verb", ["plan", "shrink"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=str)
def test_flags_survive_the_command_line_of_both_verbs(verb: str, switches: dict[str, bool]) -> None:
    flags = {"hidden": 192, "intermediate": 512, "kv_heads": 3, **switches}
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    needed = [] if verb == "plan" else ["-o", "out", "--calib", "text.txt"]
    words = ["model", *needed, *on_a_command_line(flags).split()]
    parsed = command.make_context(verb, words).params
    absent = {"tied": None, "bias": False, "square": False}
    assert {name: parsed[name] for name in ("hidden", *absent, "intermediate", "kv_heads")} == (
        absent | flags
    )


def test_shrink_has_the_sizes_of_the_plan_and_takes_no_others_besides(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = planned(tmp_path)
    shrink = ["shrink", str(tmp_path), "-o", "out", "--calib", "c", "--plan", str(file)]
    printed = CliRunner().invoke(app, [*shrink, "--print-recipe"])
    step = Recipe.parse(yaml.safe_load(printed.stdout), "recipe").shrink
    assert step is not None
    assert step.options().sizes == SIZES
    for more in (["--params", "0.6x"], ["--kv-heads", "3"], ["--square"]):
        twice = CliRunner().invoke(app, [*shrink, *more])
        assert isinstance(twice.exception, UsageError)
        assert f"give sizes by --plan {file} or by {more[0]}, not both" in str(twice.exception)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rms_norm_eps": 1e-6},
        {"torch_dtype": "bfloat16"},
        {"eos_token_id": [2, 3]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_of_a_model_with_equal_counts_and_another_config_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    other, file = CONFIG | change, planned(tmp_path)
    # Nothing but the fingerprint tells the two apart.
    assert plan(other, SIZES).as_dict() == plan(CONFIG, SIZES).as_dict()
    with pytest.raises(UsageError, match="made for another model") as refused:
        read_plan(file, other)
    assert str(file) in str(refused.value)
    assert sized(read_plan(file, CONFIG)) == SIZES


def test_order_and_layout_of_a_config_do_not_change_whose_plan_it_is(tmp_path: Path) -> None:
    scaling = dict(reversed(CONFIG["rope_scaling"].items()))
    turned = dict(reversed((CONFIG | {"rope_scaling": scaling}).items()))
    assert list(turned) != list(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(turned, indent=7, ensure_ascii=True) + "\n\n")
    again = read_config(tmp_path)
    assert fingerprint(again) == fingerprint(CONFIG)
    assert sized(read_plan(planned(tmp_path), again)) == SIZES


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other size": (lambda plan: plan["shrink"].update(hidden=144), "was edited"),
    "other switch": (lambda plan: plan["shrink"].update(tied=False), "was edited"),
    "other count": (lambda plan: plan["parameters"].reverse(), "was edited"),
    "no count": (lambda plan: plan.pop("parameters"), "parameters is not there"),
    "no fingerprint": (lambda plan: plan.pop("config_sha256"), "config_sha256 is not there"),
    "no flags": (lambda plan: plan.pop("shrink"), "is no plan"),
    "flags in a list": (lambda plan: plan.update(shrink=["hidden"]), "is no plan"),
    "missing size": (lambda plan: plan["shrink"].pop("kv_heads"), "is no plan"),
    "size as text": (lambda plan: plan["shrink"].update(hidden="192"), "is no plan"),
    "size with a point": (lambda plan: plan["shrink"].update(hidden=192.0), "is no plan"),
    "size as a switch": (lambda plan: plan["shrink"].update(kv_heads=True), "is no plan"),
    "switch as a number": (lambda plan: plan["shrink"].update(square=0), "is no plan"),
    "switch as text": (lambda plan: plan["shrink"].update(bias="no"), "is no plan"),
    "unknown switch": (lambda plan: plan["shrink"].update(refit=False), "is no plan"),
    "unknown size": (lambda plan: plan["shrink"].update(samples=3), "is no plan"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_is_refused_and_named_with_what_is_expected(
    edit: str, tmp_path: Path
) -> None:
    change, said = EDITS[edit]
    file = planned(tmp_path, change)
    with pytest.raises(UsageError, match=said) as refused:
        read_plan(file, CONFIG)
    assert str(refused.value).startswith(str(file))
    assert "expected what `dotexport plan MODEL ... --json` prints" in str(refused.value)


def test_sizes_edited_into_impossible_ones_are_refused_with_the_nearest(tmp_path: Path) -> None:
    file = planned(tmp_path, lambda plan: plan["shrink"].update(intermediate=513))
    with pytest.raises(SizeError, match=r"--intermediate 513 .* the nearest legal: 512 and 520"):
        read_plan(file, CONFIG)


def test_what_is_no_file_or_no_object_is_refused_by_name(tmp_path: Path) -> None:
    for nothing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="no such file") as refused:
            read_plan(nothing, CONFIG)
        assert f"--plan {nothing}:" in str(refused.value)
    file = tmp_path / "plan.json"
    for text, said in (("{", "is not valid JSON"), ("[]", "must hold a JSON object, not a list")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=said) as damaged:
            read_plan(file, CONFIG)
        assert str(damaged.value).startswith(str(file))
        assert "expected what `dotexport plan" in str(damaged.value)
