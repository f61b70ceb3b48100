"""Releases of transformers: what is written under one is the same model under the other.

This file runs on 4.57 and on 5.x. The `optimum` tests cross between the two: they need the Python
of an environment with 4.57, and narrowing there needs dotexport in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.exports.target import find_target
from dotexport.models import config_words
from dotexport.models.config_words import check_class
from dotexport.models.families import TABLES
from dotexport.models.family import Family
from dotexport.models.rope import in_all_words, stock_config
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.targets import genai_builder

ROOT = Path(__file__).resolve().parents[2]
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# The same rotary embedding, far from every default, in the words of 5.x and in those of 4.57.
NEWER = {"rope_parameters": SCALED | {"rope_theta": 500.0}}
OLDER = {"rope_theta": 500.0, "rope_scaling": SCALED}
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 90,
    "max_position_embeddings": 128,
}
GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
    eos_token_id=None, pad_token_id=0)
print(json.dumps(out.tolist()))
"""
PROMPTS = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(1)).tolist()


def frequencies(config: Any) -> torch.Tensor:
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(stock_config(config))
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


def test_both_ways_to_say_a_rotary_embedding_are_read_alike() -> None:
    newer, older, plain = (frequencies({**MODEL, **words}) for words in (NEWER, OLDER, {}))
    torch.testing.assert_close(newer, older, rtol=0, atol=0)
    # Not by default: the words did reach the class.
    assert (newer - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (NEWER, OLDER),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_theta": 7.0, "rope_scaling": None},
        ),
        (OLDER, OLDER),
        ({}, {}),
        (
            {
                "rope_parameters": {
                    "full_attention": SCALED | {"rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {"rope_theta": 1e6, "rope_scaling": SCALED, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_older_words_stand_beside_newer_ones(said: dict[str, Any], meant: dict[str, Any]) -> None:
    assert in_all_words(said) == {**said, **meant}


def test_a_release_that_would_read_another_base_in_silence_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 4.57 reads what only 5.x says, whichever of the two is here."""
    from dotexport.targets import hf

    folder = tiny_model(model_type="llama")
    read = stock_config(json.loads((folder / "config.json").read_text()))
    read.rope_theta = 10000.0
    meant = stock_config({**MODEL, **OLDER})
    meant.rope_theta = 500.0
    monkeypatch.setattr(hf, "stock_config", lambda config: meant)
    with pytest.raises(CheckpointError, match="--target hf"):
        hf._check_rope(folder, read)


def test_a_tokenizer_of_release_5_is_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model(model_type="llama")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<unk>"]}
    file.write_text(json.dumps(said))
    (tmp_path / "t.txt").write_text("abcdefgh" * 10)
    text = TextOptions(source=str(tmp_path / "t.txt"), seqlen=20)
    windows = [token_windows(folder, text) for folder in (source, tmp_path)]
    assert torch.equal(*windows)


def test_a_builder_that_imports_what_transformers_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "base.py"
    file.write_text("from transformers import (\n    AutoConfig,\n    NeverReleased,\n)\n")
    monkeypatch.setattr(genai_builder, "_sources", lambda: [file])
    genai_builder.builder_problems.cache_clear()
    try:
        missing = find_target("ort-cpu").missing()
    finally:
        genai_builder.builder_problems.cache_clear()
    assert len(missing) == 1
    assert "NeverReleased" in missing[0]
    assert "AutoConfig" not in missing[0]


# Across -----------------------------------------------------------------------------------------


@pytest.fixture
def other() -> str:
    if "DOTEXPORT_OPTIMUM_PYTHON" not in os.environ:
        pytest.skip("set DOTEXPORT_OPTIMUM_PYTHON to the Python of an environment with 4.57")
    return os.environ["DOTEXPORT_OPTIMUM_PYTHON"]


def said_by(python: str, folder: Path) -> Any:
    return json.loads(told(python, "-c", GENERATE, str(folder), json.dumps(PROMPTS)))


def told(python: str, *arguments: str) -> str:
    """The last line of what this Python prints, with this checkout importable."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture
def scaled_model(tiny_model: Callable[..., Path]) -> Path:
    """Its rotary embedding is far from any default."""
    return tiny_model(model_type="llama", hidden_size=64, **NEWER)


def text_for(folder: Path) -> TextOptions:
    file = folder / "letters.txt"
    file.write_text("".join(chr(33 + n * n % 87) for n in range(1500)))
    return TextOptions(source=str(file), samples=8, seqlen=64)


@pytest.mark.optimum
def test_what_is_narrowed_here_generates_the_same_tokens_on_the_other_release(
    other: str, scaled_model: Path, tmp_path: Path
) -> None:
    options = ShrinkOptions(
        sizes=SizeOptions(hidden_size=48),
        text=text_for(tmp_path),
        narrow=NarrowOptions(local=None),
    )
    shrink(scaled_model, tmp_path / "out", options, device="cpu")
    folder = tmp_path / "out/hf"
    assert said_by(other, folder) == said_by(sys.executable, folder)


@pytest.mark.optimum
def test_what_the_other_release_narrows_generates_the_same_tokens_here(
    other: str, scaled_model: Path, tmp_path: Path
) -> None:
    try:
        told(other, "-c", "import ot, typer, rich, yaml; print(1)")
    except AssertionError:
        pytest.skip("what dotexport stands on is not installed in the other environment")
    text = text_for(tmp_path)
    told(
        other,
        *(
            "-m",
            "dotexport.app.cli",
            "shrink",
            str(scaled_model),
            "-o",
            str(tmp_path / "out"),
            "--json",
        ),
        *("--hidden", "48", "--calib", text.source, "--samples", "8", "--seqlen", "64"),
        *("--heal", "none", "--device", "cpu"),
    )
    folder = tmp_path / "out/hf"
    assert said_by(sys.executable, folder) == said_by(other, folder)


@pytest.mark.parametrize("family", [f for f in TABLES if f.release > 4], ids=lambda f: f.model_type)
def test_a_release_without_the_class_or_with_a_cache_of_its_own_is_refused(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": family.model_type, "architectures": [family.architecture]}
    monkeypatch.setattr(config_words, "version", {"transformers": "4.57.6"}.get)
    with pytest.raises(UnsupportedModelError, match=r"transformers 5 and later, not with 4\.57\.6"):
        check_class(config)
