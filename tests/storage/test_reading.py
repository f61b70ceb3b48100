"""JSON and YAML of any shape are read within bounds, or refused in a sentence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dotexport.errors import CheckpointError, UsageError
from dotexport.storage import reading
from dotexport.storage.reading import UnreadableError, parse_yaml, read_json, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(9))}]\n" for n in range(1, 9)
)

YAML = {
    "a 13th month": ("when: 2020-13-45", "month must be in 1..12"),
    "an alias of itself": ("&a [*a]", "nested more than 64 deep"),
    "a mapping of itself": ("&a {b: *a}", "nested more than 64 deep"),
    "a billion values": (LAUGHS, "more than 100,000 values"),
    "brackets": ("[" * 5000, "nested more than 64 deep"),
    "deep lists": ("[" * 90 + "]" * 90, "nested more than 64 deep"),
    "a list for a key": ("? [1]\n: 2", "unhashable"),
    "an instant that is none": ("!!timestamp x", "groupdict"),
    "a switch that is none": ("!!bool maybe", "maybe"),
    "a number that is none": ("!!int x", "x"),
    "half a surrogate pair": ('"\\ud800"', "surrogate"),
    "an object of Python": ("!!python/object:os.system {}", "python/object"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_of_any_shape_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    text, said = YAML[name]
    file = tmp_path / "r.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError) as refused:
        read_yaml(file, what="recipe r")
    assert str(refused.value).startswith("recipe r is not YAML: ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert time.process_time() - started < 5


JSON = {
    "deep lists": (b"[" * 5000 + b"]" * 5000, "nested more than 64 deep"),
    "open lists": (b"[" * 500_000, "nested more than 64 deep"),
    "deep objects": (b'{"a":' * 80 + b"1" + b"}" * 80, "nested more than 64 deep"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogate"),
    "half a surrogate pair as a key": (b'{"\\udfff": 1}', "surrogate"),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    "no UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_of_any_shape_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    content, said = JSON[name]
    file = tmp_path / "m.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="take a fresh copy") as refused:
        read_json(file, advice="take a fresh copy")
    assert said in str(refused.value)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_json_does_not_have_is_refused_where_it_would_spoil_figures(
    number: str, tmp_path: Path
) -> None:
    file = tmp_path / "m.json"
    file.write_text(f'{{"a": [{number}]}}')
    assert read_json(file, advice="")["a"]  # a config.json may have it
    with pytest.raises(CheckpointError, match="a number in it is"):
        read_json(file, advice="", finite=True)


def test_a_file_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "JSON_BYTES", 1 << 20)
    for read in (
        lambda: read_json(Path("/dev/zero"), advice=""),
        lambda: read_yaml(Path("/dev/zero"), what="it"),
    ):
        with pytest.raises((CheckpointError, UsageError), match="has more than 1 MiB"):
            read()


def test_what_is_sound_is_read_as_it_is(tmp_path: Path) -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    (tmp_path / "a.json").write_text('{"a": ["\\ud83d\\ude00", 1.5, null]}')
    assert read_json(tmp_path / "a.json", advice="") == {"a": ["😀", 1.5, None]}
    with pytest.raises(UnreadableError):
        parse_yaml("[")
