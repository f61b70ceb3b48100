"""The model card: its front matter is YAML, and names of others are never markup in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dotexport.models.origin import licence
from dotexport.outputs import card
from dotexport.outputs.markdown import code, front_matter, plain
from dotexport.storage import manifest

NAMES = [
    "plain-model",
    "owner/model_7b",
    "a: b",
    "- x",
    "# no heading",
    "a\n---\nlicense: mit\nb",
    "---\n# Another card\n",
    "<script>alert(1)</script>",
    "<!-- hidden",
    "a | b | c",
    "[text](http://example.org)",
    "**loud** `code`",
    "yes",
    "2020-13-45",
    "null",
    "{{ 7 * 7 }}",
    "日本語 é",
]


def record(name: str) -> dict[str, Any]:
    return {
        "source": {"model": name, "licence": name, "bytes": 8},
        "sizes": {"parameters": [2, 1]},
        "shrink": {
            "narrow": {"mlp": "obs", "heads": "obs", "refit": True, "local": None, "seed": 0}
        },
        "basis": {"method": "pca"},
        "calibration": {"source": name, "windows": 1, "seqlen": 8},
    }


def written(out: Path, name: str) -> str:
    manifest.update(out, **record(name))
    card.write(out)
    return (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_front_matter_says_the_name_and_nothing_else(tmp_path: Path, name: str) -> None:
    text = written(tmp_path, name)
    # As huggingface_hub takes it apart.
    block = re.match(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---([\r\n]|$)", text)
    assert block is not None
    assert yaml.safe_load(block[1]) == {
        "library_name": "transformers",
        "base_model": name,
        "license": name,
        "tags": ["dotexport", "pruned"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_breaks_neither_out_of_its_line_nor_into_html(tmp_path: Path, name: str) -> None:
    usual, odd = written(tmp_path / "usual", "m"), written(tmp_path / "odd", name)

    def body(text: str) -> list[str]:
        return text[text.index("\n---\n") + 5 :].splitlines()

    assert len(body(odd)) == len(body(usual))
    spans = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(body(odd)))
    assert "<script" not in spans
    assert "<!--" not in spans
    assert "](http" not in spans.replace("\\]", "")


def test_a_code_span_is_ended_by_nothing_in_it() -> None:
    assert code("text.txt") == "`text.txt`"
    assert code("a`b``c") == "``` a`b``c ```"
    assert code("a\nb") == "`a b`"


def test_what_is_no_text_stays_and_nothing_is_escaped_twice() -> None:
    assert plain(0.5) == 0.5
    assert plain(plain("a|b <c>")) == "a\\|b &lt;c&gt;"
    assert front_matter(license=None, tags=["a"]) == "---\ntags:\n- a\n---"


CARDS = {
    "---\nlicense: mit\n---\n": "mit",
    "---\nlicense:\n- mit\n- apache-2.0\n---\n": "mit, apache-2.0",
    "---\ndate: 2023-13-45\nlicense: mit\n---\n": None,
    "---\nlicense: {a: b}\n---\n": None,
    "---\na: &a [*a]\n---\n": None,
    "---\n" + "[" * 5000: None,
    "---\n!!bool maybe\n---\n": None,
    "---\nlicense: 7\n---\n": None,
    "no front matter": None,
}


@pytest.mark.parametrize("text", CARDS)
def test_an_original_card_of_any_shape_names_its_licence_or_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence(tmp_path) == CARDS[text]


def test_a_card_that_is_no_text_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert json.dumps(licence(tmp_path))
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    assert licence(tmp_path / "folder") is None


def test_the_model_is_narrowed_whatever_its_card_says(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:

    from dotexport.app.shrinking import shrink
    from dotexport.app.steps import ShrinkStep
    from dotexport.options import build

    model = shutil.copytree(tiny_llama("wide-heads"), tmp_path / "model")
    (model / "README.md").write_text("---\ndate: 2023-13-45\n---\n")
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 " * 100)
    asked = {"samples": 2, "seqlen": 32, "intermediate": 40, "heal": "none"}
    step = build(ShrinkStep, calib=str(tmp_path / "t.txt"), **asked)
    shrink(model, tmp_path / "out", step.options())
    assert "license" not in (tmp_path / "out" / "README.md").read_text()
