"""Recipes: what is written can be read again, and what is not meant is refused."""

from __future__ import annotations

import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dotexport.app import cli, recipe
from dotexport.app.recipe import Recipe
from dotexport.app.steps import BenchStep, EvalStep, ShrinkStep
from dotexport.errors import UsageError
from dotexport.options import build, flags_of

LEAST = {"model": "m", "shrink": {"calib": "c"}}


def shrink_step(**options: Any) -> ShrinkStep:
    return Recipe.parse({"model": "m", "shrink": {"calib": "c"} | options}, "r").shrink


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Recipe(
        model="m",
        shrink=build(ShrinkStep, params="0.7x", calib="c", epsilon=1e-3, refit=False, seqlen=None),
        export=("hf", "ort-cpu:int4"),
        eval=build(EvalStep, text="t", samples=3),
        bench=(BenchStep(), BenchStep(target="hf", threads=2, min_seconds=0.5)),
    )
    (tmp_path / "r.yaml").write_text(written.dump())
    assert Recipe.load(tmp_path / "r.yaml") == written


def test_a_dump_spells_out_every_option() -> None:
    dumped = yaml.safe_load(Recipe.parse(LEAST, "r").dump())
    assert dumped["shrink"].keys() == {flag.key for flag in flags_of(ShrinkStep)}
    assert dumped["eval"] is None


def test_the_same_recipe_has_the_same_dump_however_it_was_spelled() -> None:
    short = Recipe.parse(LEAST, "r")
    spelled = Recipe.parse(yaml.safe_load(short.dump()), "r")
    assert spelled.dump() == short.dump()


def test_the_recipe_of_the_demo_is_sound() -> None:
    demo = Recipe.load(Path(recipe.__file__).with_name("demo.yaml"))
    assert demo.model == "embedded"
    assert demo.shrink.options().sizes.params == "0.7x"


@pytest.mark.parametrize(
    ("step", "verb"), [(ShrinkStep, "shrink"), (EvalStep, "eval"), (BenchStep, "bench")]
)
def test_keys_and_defaults_of_a_step_are_the_flags_of_its_verb(step: type, verb: str) -> None:
    verbs: Any = typer.main.get_command(cli.app)
    shown = {parameter.name: parameter for parameter in verbs.commands[verb].params}
    flags = flags_of(step)
    assert len({flag.key for flag in flags}) == len(flags) > 0
    for flag in flags:
        required = flag.default is MISSING
        assert shown[flag.key].required == required, flag.key
        assert shown[flag.key].default == (None if required else flag.default), flag.key


@pytest.mark.parametrize(
    ("written", "meant"), [("0.05", 0.05), ("1e-2", 0.01), ("1.0e-2", 0.01), ("1", 1.0)]
)
def test_numbers_are_read_as_people_write_them(written: str, meant: float) -> None:
    assert shrink_step(epsilon=yaml.safe_load(written)).narrow.transport.epsilon == meant


@pytest.mark.parametrize(("written", "meant"), [("0.7x", "0.7x"), ("5000", "5000"), ("6e9", "6e9")])
def test_budgets_may_look_like_numbers(written: str, meant: str) -> None:
    assert shrink_step(params=yaml.safe_load(written)).sizes.params == meant


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("samples", "four", "int"),
        ("samples", 4.5, "int"),
        ("samples", True, "int"),
        ("samples", None, "int"),
        ("refit", "yes", "bool"),
        ("refit", 1, "bool"),
        ("epsilon", "small", "float"),
        ("epsilon", False, "float"),
        ("calib", ["a.txt"], "str"),
        ("calib", None, "str"),
        ("hidden", "wide", "int | None"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(key: str, value: object, kind: str) -> None:
    with pytest.raises(UsageError) as info:
        shrink_step(**{key: value})
    assert str(info.value) == f"r: shrink.{key} must be {kind}, not {value!r}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "r must be a mapping"),
        (["a"], "r must be a mapping"),
        ({"model": "m"}, "r lacks the key 'shrink'"),
        (LEAST | {"shrnk": 1}, "r has the unknown key 'shrnk'; known: model, shrink, export"),
        (LEAST | {"eval": {}}, "r: eval lacks the key 'text'"),
        ({"model": "m", "shrink": {"calib": "c", "hiden": 8}}, "unknown key 'hiden'"),
        ({"model": ["m"], "shrink": {"calib": "c"}}, "r: model must be str"),
        (LEAST | {"export": "hf"}, "r: export must be a list, not 'hf'"),
        (LEAST | {"export": [{}]}, "r: export must be str"),
        (LEAST | {"eval": {"txt": 1}}, "r: eval has the unknown key 'txt'; known: text, samples"),
        (LEAST | {"bench": {"target": "hf"}}, "r: bench must be a list"),
        (LEAST | {"bench": [{"batch": "two"}]}, "r: bench.batch must be int | None, not 'two'"),
    ],
)
def test_what_is_no_recipe_is_refused(content: object, message: str) -> None:
    with pytest.raises(UsageError) as info:
        Recipe.parse(content, "r")
    assert message in str(info.value)


@pytest.mark.parametrize("content", [b"{a: [b", b"\xff\xfe\x00", b"!!python/object:os.system {}"])
def test_what_is_no_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="is not YAML"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            Recipe.load(file)


def test_every_kind_of_value_has_a_reader() -> None:
    """A new option of a new kind must not fail at the user's desk."""
    for step in (ShrinkStep, EvalStep, BenchStep):
        for flag in flags_of(step):
            parts = set(typing.get_args(flag.kind) or [flag.kind]) - {type(None)}
            assert parts <= {bool, int, float, str}, flag.key
