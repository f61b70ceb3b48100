"""Encoders with fewer tokens: exact on text of those that stay, sound on other text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.sentences import batches
from dotexport.errors import UsageError

from .command import run

Made = Callable[[Path, str], Path]
MODELS = ["bert", "roberta", "xlm-roberta", "distilbert", "masked"]
MODELS += ["modernbert-MaskedLM", "deberta-masked"]


@pytest.mark.parametrize("name", MODELS)
def test_text_of_kept_tokens_is_embedded_exactly_as_before(
    name: str, text: str, made: Made, tmp_path: Path
) -> None:
    model, out = made(tmp_path / "model", name), tmp_path / "out"
    shrunk = run("shrink", model, "-o", out, "--vocab-for", text, "--calib", text)
    before, after = open_encoder(model), open_encoder(out)
    assert shrunk["sizes"]["vocab_size"] == [224, 128]  # type: ignore[index]
    rows = sum(  # of everything that has a row per token
        value.numel() // 224 for value in before.model.parameters() if value.shape[0] == 224
    )
    whole, narrower = shrunk["sizes"]["parameters"]  # type: ignore[index]
    assert whole - narrower == (224 - 128) * rows
    options = SentenceOptions(source=text)
    lines = [(line,) for line in Path(text).read_text(encoding="utf-8").splitlines()[:20]]
    with torch.no_grad():
        for theirs, ours in zip(
            batches(before, lines, options), batches(after, lines, options), strict=True
        ):
            wanted = before.base(**theirs.inputs).last_hidden_state
            assert torch.equal(after.base(**ours.inputs).last_hidden_state, wanted)
    quality = run("eval", out, "--baseline", model, "--text", text, "--samples", 64)
    assert quality["cosine"] == pytest.approx(1, abs=1e-5)
    assert quality["recall_at_10"] == 1
    # Of a head over tokens the softmax is over those that both have.
    assert quality.get("kl", 0.0) == pytest.approx(0, abs=0.05 if "asked" in name else 1e-6)


def test_text_of_other_words_is_spelled_and_compared(text: str, made: Made, tmp_path: Path) -> None:
    model, out = made(tmp_path / "model", "distilbert"), tmp_path / "out"
    run("shrink", model, "-o", out, "--vocab-for", text, "--calib", text)
    said = Path(text).read_text(encoding="utf-8").splitlines()[:40]
    mixed = [f"{line} w{100 + n}" if n % 2 else line for n, line in enumerate(said)]
    file = tmp_path / "mixed.txt"
    file.write_text("\n".join(mixed), encoding="utf-8")
    tokens = open_encoder(out)
    [read] = batches(tokens, [("w0 w1 w2 w3 w150",)], SentenceOptions(source=text))
    assert read.inputs["input_ids"].shape[1] > 7  # the last word in pieces
    quality = run("eval", out, "--baseline", model, "--text", file, "--samples", 40)
    assert quality["cosine"] < 0.9999  # type: ignore[operator]
    assert quality["kl"] == pytest.approx(0, abs=1e-6)  # of the sentences that both read alike
    assert quality["agreement"] == 1


def test_distillation_makes_up_for_words_that_are_spelled(
    text: str, made: Made, tmp_path: Path
) -> None:
    """The teacher reads them whole; one that reads pieces too would have nothing to say here."""
    said = Path(text).read_text(encoding="utf-8").splitlines()
    mixed = tmp_path / "mixed.txt"
    lines = [f"w120 w121 {line}" if n % 2 else line for n, line in enumerate(said)]
    mixed.write_text("\n".join(lines), encoding="utf-8")
    asked = ("--vocab-for", text, "--calib", mixed, "--heal", 120)
    shrunk = run("shrink", made(tmp_path / "model", "bert"), "-o", tmp_path / "out", *asked)
    before, after = shrunk["cosine"]  # type: ignore[misc]
    assert before < 0.999
    assert 1 - after < 0.95 * (1 - before)  # of weights that say nothing


def test_a_budget_counts_the_tokens_that_left(text: str, made: Made, tmp_path: Path) -> None:
    model, out = made(tmp_path / "model", "bert"), tmp_path / "out"
    size = ("--params", "0.7x", "--vocab-for", text, "--calib", text)
    shrunk = run("shrink", model, "-o", out, *size)
    before, after = shrunk["sizes"]["parameters"]  # type: ignore[index]
    assert 0.65 * before < after <= 0.7 * before
    assert shrunk["sizes"]["intermediate_size"][1] < 64 or shrunk["kept_layers"] != [0, 1, 2]  # type: ignore[index]
    record = json.loads((out / "dotexport.json").read_text(encoding="utf-8"))
    assert record["vocabulary"]["rows"] == [224, 128]
    ids = json.loads((out / "reports/vocabulary.json").read_text(encoding="utf-8"))["original_ids"]
    table = open_encoder(model).model.get_input_embeddings().weight[ids]  # type: ignore[operator]
    assert torch.equal(open_encoder(out).model.get_input_embeddings().weight, table)  # type: ignore[operator]


def test_nothing_asked_for_is_refused(text: str, made: Made, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "bert")
    args = ["shrink", str(model), "-o", str(tmp_path / "out"), "--calib", text]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, UsageError)
    assert "--vocab-for" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_another_form_of_the_tokens_does_not_stay(text: str, made: Made, tmp_path: Path) -> None:
    """A reader of it would give ids of the original."""
    model = made(tmp_path / "model", "xlm-roberta")
    (model / "sentencepiece.bpe.model").write_bytes(b"of all tokens")
    run("shrink", model, "-o", tmp_path / "out", "--vocab-for", text, "--calib", text)
    assert not (tmp_path / "out/hf/sentencepiece.bpe.model").exists()
