"""Models that see: their language model is read as if it were alone, and put back where it was.

Shapes: B texts, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner, Result

from dotexport.app import rejoining
from dotexport.app.cli import app
from dotexport.app.opening import check_tensors
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import (
    CheckpointError,
    ParityError,
    SizeError,
    UnsupportedModelError,
    UsageError,
)
from dotexport.exports.exporting import export
from dotexport.models.checkpoint import TABLE, Checkpoint, stored_config
from dotexport.models.config_words import say_once, settled
from dotexport.models.loading import load_float32
from dotexport.models.multimodal import language_config, stored_name
from dotexport.sizes.beside_towers import beside_towers

from ..conftest import BEFORE_5, randomise
from .changed_models import TOKENS_BL, letters, logits, rewritten

PICTURE, SIZE = 89, 28  # a token, pixels
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
SQUARE = TOWER | {"image_size": SIZE}
OF_QWEN: dict[str, Any] = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": 14,
        "num_position_embeddings": 16,
    },
    "image_token_id": PICTURE,
    "video_token_id": PICTURE - 1,
}
# Class of the whole -> class of its language model, and the words around that.
WHOLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {"vision_config": SQUARE, "mm_tokens_per_image": 4, "image_token_index": PICTURE},
    ),
    "llava": (
        "llama",
        {
            "vision_config": SQUARE | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": PICTURE,
        },
    ),
    "mistral3": (
        "mistral",
        {
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 56},
            "image_token_index": PICTURE,
        },
    ),
    "internvl": (
        "qwen2",
        {
            "vision_config": TOWER | {"image_size": [SIZE] * 2, "patch_size": [14, 14]},
            "image_token_id": PICTURE,
        },
    ),
    "idefics3": ("llama", {"vision_config": SQUARE, "image_token_id": PICTURE, "scale_factor": 1}),
    "smolvlm": ("llama", {"vision_config": SQUARE, "image_token_id": PICTURE, "scale_factor": 1}),
    "lfm2_vl": ("lfm2", {"vision_config": TOWER | {"num_patches": 4}, "image_token_id": PICTURE}),
    "qwen3_5": (
        "qwen3_5_text",
        OF_QWEN,
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        OF_QWEN,
    ),
    "gemma4": (
        "gemma4_text",
        # Its own words for pictures lie beyond these tokens: where there is none, it reads padding.
        {
            "vision_config": TOWER | {"num_key_value_heads": 2, "head_dim": 16},
            "audio_config": None,
        },
    ),
}
OF_RELEASE_5 = {"gemma4", "lfm2_vl", "qwen3_5", "qwen3_5_moe"}

Whole = Callable[[str], Path]


@pytest.fixture(scope="session")
def seeing(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Class of the whole -> a folder of such a model, written once."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in CONFIG_MAPPING or (kind in OF_RELEASE_5 and BEFORE_5):
            pytest.skip(f"{kind} is a class of a later transformers")
        if kind not in folders:
            text, words = WHOLES[kind]
            alone = tiny_model(model_type=text)
            inner = json.loads((alone / "config.json").read_text())
            inner = {key: value for key, value in inner.items() if key != "architectures"}
            torch.manual_seed(1)
            config = AutoConfig.for_model(kind, text_config=inner, **words)
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
            folders[kind] = tmp_path_factory.mktemp(kind) / "whole"
            randomise(AutoModelForImageTextToText.from_config(config)).save_pretrained(
                folders[kind]
            )
            for file in alone.glob("tokenizer*"):
                shutil.copyfile(file, folders[kind] / file.name)
            # As its class writes them: another one would add its own rules to these.
            AutoTokenizer.from_pretrained(folders[kind]).save_pretrained(folders[kind])
            (folders[kind] / "preprocessor_config.json").write_text('{"size": 28}')
        return folders[kind]

    return make


@pytest.fixture
def without_eight(seeing: Whole, tmp_path: Path) -> Whole:
    """The same, of which eight neurons of every MLP add nothing."""

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("mlp.down_proj.weight"):
                tensor[:, 16:24] = 0.0

    return lambda kind: rewritten(seeing(kind), tmp_path / f"silent-{kind}", silence)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def shrunk(model: Path, out: Path, *words: object) -> Path:
    text = letters(model.parent).source
    plain = ("--calib", text, "--samples", 8, "--seqlen", 32, "--other", "none", "--heal", "none")
    done = call("shrink", model, "-o", out, *plain, *words)
    assert done.exit_code == 0, done.stderr
    return out


def whole_logits(folder: Path, **asked: Any) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        found: torch.Tensor = model(**({"input_ids": TOKENS_BL} | asked)).logits
    return found


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHOLES)
def test_the_language_model_says_of_text_what_the_whole_says(kind: str, seeing: Whole) -> None:
    """The same operations in the same order, so the same numbers but for 1e-6 of the largest."""
    folder = seeing(kind)
    found = Checkpoint.open(folder)
    check_tensors(found, *read_model(found.config))
    assert found.config["model_type"] == WHOLES[kind][0]
    with torch.inference_mode():
        alone = load_float32(found)(input_ids=TOKENS_BL).logits
    expected = whole_logits(folder)
    assert (alone - expected).abs().max() < 1e-6 * expected.abs().max()
    table = found.stored[TABLE]
    assert {own: stored_name(own, table) for own in found.stored} == dict(found.stored)


def test_what_the_whole_says_of_ties_and_rounding_is_said_of_the_language_model(
    seeing: Whole,
) -> None:
    stored = stored_config(seeing("gemma3"))
    said = {"quantization_config": {"quant_method": "fp8"}, "eos_token_id": [1, 7]}
    inner = {k: v for k, v in stored["text_config"].items() if k != "eos_token_id"}
    found = language_config({**stored, **said, "tie_word_embeddings": True, "text_config": inner})
    assert found["tie_word_embeddings"]
    assert {key: found[key] for key in said} == said
    assert not any(key.startswith("_") for key in settled(stored, of="it"))
    # Where the whole says nothing, its class may tie by default what the language model's does not.
    silent = {k: v for k, v in stored_config(seeing("mistral3")).items() if "tie" not in k}
    assert not language_config(silent)["tie_word_embeddings"]


def test_a_whole_without_a_table_for_its_language_model_is_refused(
    seeing: Whole, tmp_path: Path
) -> None:
    folder = rewritten(seeing("llava"), tmp_path / "other", lambda _: None, model_type="voxtral")
    done = call("plan", folder, "--params", "0.8x")
    assert isinstance(done.exception, UnsupportedModelError)
    assert "more than a language model" in str(done.exception)


def test_an_export_holds_the_language_model_alone(seeing: Whole, tmp_path: Path) -> None:
    folder = seeing("llava")
    export(folder, ["hf", "onnx"], out=tmp_path / "out")  # each held against torch
    stored = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    assert stored.keys() == Checkpoint.open(folder).specs.keys()
    said, expected = logits(tmp_path / "out" / "hf"), whole_logits(folder)
    assert (said - expected).abs().max() < 1e-6 * expected.abs().max()


# Putting it back ----------------------------------------------------------------------------------


def seen(kind: str) -> dict[str, Any]:
    """A text with a picture."""
    generator = torch.Generator().manual_seed(2)
    wide = 2 * SIZE if kind == "mistral3" else SIZE  # of which four patches become one token
    pixels = torch.randn(1, 3, SIZE, wide, generator=generator)
    more = {"image_sizes": torch.tensor([[SIZE, wide]])} if kind == "mistral3" else {}
    ids = [5, 7, *[PICTURE] * (2 if kind == "mistral3" else 4), 9, 11, 13]
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, **more}


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3"])
def test_what_adds_nothing_leaves_and_pictures_are_seen_as_before(
    kind: str, without_eight: Whole, tmp_path: Path
) -> None:
    """Neurons that add nothing, none of the others refitted: logits stay but for float32's
    rounding. That the picture is looked at is seen by another one."""
    model = without_eight(kind)
    out = shrunk(model, tmp_path / "out", "--intermediate", 80, "--no-refit")
    done = call("rejoin", out, model, "-o", tmp_path / "whole")
    assert done.exit_code == 0, done.stderr
    asked = seen(kind)
    expected, found = (whole_logits(at, **asked) for at in (model, tmp_path / "whole" / "hf"))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    other = whole_logits(model, **{**asked, "pixel_values": -asked["pixel_values"]})
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "gemma4", "smolvlm"])
def test_towers_and_other_files_stay_as_they_are(kind: str, seeing: Whole, tmp_path: Path) -> None:
    model, whole = seeing(kind), tmp_path / "whole"
    out = shrunk(model, tmp_path / "out", "--intermediate", 80)
    done = call("rejoin", out, model, "-o", whole, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["hf"]["parity"]["passed"]
    before, after = tensors_of(model), tensors_of(whole / "hf")
    language = set(Checkpoint.open(model).stored.values())
    towers = before.keys() - language
    assert towers
    assert all(torch.equal(after[name], before[name]) for name in towers)
    assert after.keys() == before.keys()
    config, narrowed = stored_config(whole / "hf"), stored_config(out / "hf")
    assert config["architectures"] == stored_config(model)["architectures"]
    assert config["text_config"]["intermediate_size"] == narrowed["intermediate_size"] == 80
    assert (whole / "hf" / "preprocessor_config.json").read_bytes() == b'{"size": 28}'


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", ["gemma3", "internvl"])
def test_fewer_layers_are_put_back_and_the_whole_is_an_output_like_others(
    kind: str, seeing: Whole, tmp_path: Path
) -> None:
    """It is verified, written again over itself, and narrowed again."""
    model, whole = seeing(kind), tmp_path / "whole"
    out = shrunk(model, tmp_path / "out", "--layers", 2, "--kv-heads", 1)
    for more in ((), ("--overwrite",)):
        done = call("rejoin", out, model, "-o", whole, *more)
        assert done.exit_code == 0, done.exception
    assert stored_config(whole / "hf")["text_config"]["num_hidden_layers"] == 2
    assert call("verify", whole).exit_code == 0
    if kind == "internvl":
        done = call("export", whole, "--target", "onnx")  # of its language model
        assert done.exit_code == 0, done.exception
    again = shrunk(whole, tmp_path / "again", "--intermediate", 64)
    assert call("rejoin", again, whole, "-o", tmp_path / "smaller").exit_code == 0


def test_words_that_the_class_reads_once_do_not_come_back(seeing: Whole, tmp_path: Path) -> None:
    """LFM2's width of the MLP has an older word, which would win over the new one."""
    model = seeing("lfm2_vl")
    inner = stored_config(model)["text_config"] | {
        "block_ff_dim": 64,
        "block_auto_adjust_ff_dim": False,
    }
    model = rewritten(model, tmp_path / "older", lambda _: None, text_config=inner)
    out = shrunk(model, tmp_path / "out", "--intermediate", 56)
    done = call("rejoin", out, model, "-o", tmp_path / "whole")
    assert done.exit_code == 0, done.exception


def test_keys_that_no_layer_looks_at_are_passed_over(seeing: Whole, tmp_path: Path) -> None:
    """Published files of Gemma 4 may hold some for the layers that look at those of others."""
    model = seeing("gemma4")
    last = stored_config(model)["text_config"]["num_hidden_layers"] - 1
    name = f"model.language_model.layers.{last}.self_attn.k_proj.weight"

    def added(tensors: dict[str, torch.Tensor]) -> None:
        assert name not in tensors
        tensors[name] = torch.zeros(32, 48)

    model = rewritten(model, tmp_path / "more", added)
    assert name not in Checkpoint.open(model).stored.values()
    out = shrunk(model, tmp_path / "out", "--intermediate", 80)
    assert call("rejoin", out, model, "-o", tmp_path / "whole").exit_code == 0
    assert name not in tensors_of(tmp_path / "whole" / "hf")


def test_a_budget_leaves_the_width_that_towers_write_into(
    seeing: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, words = seeing("llava"), stored_config(seeing("llava"))
    say_once.cache_clear()
    done = call("plan", model, "--params", "0.8x", "--json")
    assert json.loads(done.stdout)["hidden_size"] == [48, 48]
    assert "dotexport rejoin" in caplog.text
    named = "hidden_size,intermediate_size"
    for asked in (
        SizeOptions(params="0.8x", axes=named),
        SizeOptions(params="0.8x", sizes={"hidden_size": 40}),
        SizeOptions(sizes={"intermediate_size": 80}),
    ):
        assert beside_towers(words, asked) is asked
    out = shrunk(model, tmp_path / "out", "--params", "0.8x", "--allocate", "rule")
    assert call("rejoin", out, model, "-o", tmp_path / "whole").exit_code == 0


def test_what_cannot_be_put_back_is_refused(
    seeing: Whole, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, alone = seeing("llava"), tiny_model(model_type="llama")
    narrower = shrunk(model, tmp_path / "narrower", "--hidden", 40)
    with pytest.raises(SizeError, match=r"hidden_size 40.*of 48.*--axes"):
        rejoining.rejoin(narrower, model, tmp_path / "whole")
    whole = Checkpoint.open(model)
    with pytest.raises(SizeError, match=r"80 tokens.*--vocab"):
        rejoining._check_widths(whole, replace(whole, config={**whole.config, "vocab_size": 80}))
    out = shrunk(model, tmp_path / "out", "--intermediate", 80)
    for place in (out, out / "hf", out / "whole", model, tmp_path):
        with pytest.raises(UsageError, match="apart"):
            rejoining.rejoin(out, model, place, overwrite=True)
    with pytest.raises(CheckpointError, match="not made from"):
        rejoining.rejoin(out, seeing("gemma3"), tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="no towers"):
        rejoining.rejoin(out, alone, tmp_path / "whole")
    linked = rewritten(model, tmp_path / "linked", lambda _: None)
    (linked / "preprocessor_config.json").symlink_to(tiny_model(model_type="llama") / "config.json")
    led = shrunk(linked, tmp_path / "led", "--intermediate", 80)
    with pytest.raises(CheckpointError, match="link"):
        rejoining.rejoin(led, linked, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_whole_that_says_something_else_is_not_kept(
    seeing: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeing("llava")
    out = shrunk(model, tmp_path / "out", "--intermediate", 80)
    read = rejoining._read

    def spoilt(place: rejoining.Place) -> torch.Tensor:
        found: torch.Tensor = read(place)
        return found * 1.01 if place.name.endswith("o_proj.weight") else found

    monkeypatch.setattr(rejoining, "_read", spoilt)
    with pytest.raises(ParityError, match="not kept"):
        rejoining.rejoin(out, model, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
