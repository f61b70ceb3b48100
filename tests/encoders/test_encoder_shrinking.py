"""Text encoders through the command line: narrowed, loaded by stock classes, judged, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_options import ShrinkOptions
from dotexport.encoders.encoder_quality import recall
from dotexport.encoders.encoder_walk import walk
from dotexport.encoders.sentences import Batch
from dotexport.errors import CheckpointError, SizeError, UsageError

from .command import run

Made = Callable[[Path, str], Path]


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "deberta-v2"]
)
def test_the_result_loads_with_its_stock_class(
    name: str, text: str, made: Made, tmp_path: Path
) -> None:
    model, out = made(tmp_path / "model", name), tmp_path / "out"
    shrunk = run(
        "shrink", model, "-o", out, "--params", "0.8x", "--count", "layers", "--calib", text
    )
    [kind] = json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"]
    loaded, found = getattr(transformers, kind).from_pretrained(
        out / "hf", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    before, after = shrunk["sizes"]["parameters_of_layers"]  # type: ignore[index]
    assert 0.7 * before < after <= 0.8 * before
    assert sum(p.numel() for p in loaded.parameters()) == shrunk["sizes"]["parameters"][1]  # type: ignore[index]
    quality = run("eval", out, "--baseline", model, "--text", text, "--samples", 64)
    assert 0.5 < quality["cosine"] < 1
    assert 0 < quality["recall_at_10"] <= 1
    assert ("kl" in quality) == (name not in ("bert", "modernbert"))


def test_repair_beats_leaving_it_out(sentence_transformer: Path, text: str, tmp_path: Path) -> None:
    cosines = {}
    for method in ("dot", "obs", "select"):
        size = ("--intermediate", 32, "--mlp", method, "--calib", text)
        shrunk = run("shrink", sentence_transformer, "-o", tmp_path / method, *size)
        cosines[method] = shrunk["cosine"][0]  # type: ignore[index]
    assert cosines["obs"] > cosines["select"]
    assert cosines["dot"] > cosines["select"]


def test_sentence_transformers_files_are_carried_over(
    sentence_transformer: Path, text: str, tmp_path: Path
) -> None:
    size = ("--layers", 2, "--calib", text, "--heal", 20)
    model = Path(shutil.copytree(sentence_transformer, tmp_path / "model"))
    dense = model / "2_Dense/model.safetensors"  # another module has its own weights
    dense.parent.mkdir()
    dense.write_bytes(b"of another module")
    shrunk = run("shrink", model, "-o", tmp_path / "out", *size)
    said = ("modules.json", "1_Pooling/config.json", "tokenizer.json", "2_Dense/model.safetensors")
    for name in said:
        carried = (tmp_path / "out/hf" / name).read_bytes()
        assert carried == (model / name).read_bytes()
    config = json.loads((tmp_path / "out/hf/config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)
    closed, healed = shrunk["cosine"]  # type: ignore[misc]
    assert healed > closed


def test_nothing_cut_is_the_same_model(sentence_transformer: Path) -> None:
    encoder = open_encoder(sentence_transformer)
    tokens = torch.randint(4, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    some = [Batch(inputs), Batch(inputs, held=True)]
    model = walk(encoder, some, [0, 1, 2], 64, "dot").model
    with torch.no_grad():
        gap = model(**inputs).last_hidden_state - encoder.model(**inputs).last_hidden_state
    assert gap.abs().max() < 1e-4


def test_recall_counts_shared_neighbours() -> None:
    turned = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator()), dim=-1)
    assert recall(turned, turned) == 1.0
    assert recall(turned, turned.flip(0)) < 0.7


def test_a_plan_lists_what_shrink_narrows(text: str, made: Made, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "distilbert")
    asked = ("--params", "0.8x", "--vocab", 100, "--vocab-for", text)
    planned = run("plan", model, *asked)
    shrunk = run("shrink", model, "-o", tmp_path / "out", *asked, "--calib", text)
    whole, narrow = shrunk["sizes"]["parameters"]  # type: ignore[index]
    assert planned["original"]["parameters"] == whole  # type: ignore[index]
    choices: list[dict[str, int]] = planned["choices"]  # type: ignore[assignment]
    tried: list[dict[str, int]] = shrunk["tried"]  # type: ignore[assignment]
    listed = [(row["dim"], row["hidden_dim"], row["n_layers"]) for row in choices]
    narrowed = [(row["hidden"], row["width"], row["depth"]) for row in tried]
    assert [sizes for sizes in listed if sizes in narrowed] == narrowed  # in this order
    [taken] = [row for row in choices if row["parameters"] == narrow]
    assert taken["vocab_size"] == 128  # a multiple of 64
    assert all(row["ratio"] <= 0.8 and row["bytes"] == 4 * row["parameters"] for row in choices)
    shown = CliRunner().invoke(app, ["plan", str(model), "--params", "0.8x"])
    assert shown.exit_code == 0, shown.output
    assert "neurons" in shown.output
    assert f"{whole:,}" in shown.output
    with pytest.raises(UsageError, match="--vocab-for TEXT"):
        run("plan", model, "--vocab", 100)


@pytest.mark.parametrize("verb", ["latency", "report"])
def test_other_verbs_name_the_kind(verb: str, sentence_transformer: Path) -> None:
    with pytest.raises(UsageError, match=f"is a text encoder, which {verb} does not take"):
        run(verb, sentence_transformer)


def test_refusals_say_what_to_do(sentence_transformer: Path, text: str, tmp_path: Path) -> None:
    asked = ("shrink", sentence_transformer, "-o", tmp_path / "out", "--calib", text)
    with pytest.raises(SizeError, match="the least is"):
        run(*asked, "--params", "0.01x")
    with pytest.raises(UsageError, match="cannot stay"):
        run(*asked, "--intermediate", 65)
    with pytest.raises(UsageError, match="say how narrow"):
        run(*asked)
    with pytest.raises(UsageError, match="not known"):
        ShrinkOptions(text=None, params="0.5x", method="best")  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(*asked, "--params", "0.9x")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_weights_of_another_config_are_refused(made: Made, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "bert")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no fitting tensor"):
        open_encoder(folder)
