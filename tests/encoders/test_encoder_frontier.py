"""Encoders at equal bytes, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dotexport.bench import encoder_frontier
from dotexport.bench.frontier_points import EncoderPoint, Frontier, OnSentences
from dotexport.bench.report.frontier_words import plot, verdict
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.encoder_quality import evaluate
from dotexport.errors import CheckpointError, UsageError

from .command import run

pytest.importorskip("onnxscript")

Made = Callable[[Path, str], Path]
FAST = ("--rounds", 2, "--seconds", 0, "--batch", 4, "--seqlen", 16)


@pytest.fixture(scope="module")
def narrow(sentence_transformer: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("narrowed") / "narrow"
    run("shrink", sentence_transformer, "-o", out, "--intermediate", 40, "--calib", text)
    return out


def test_figures_are_those_of_eval_and_a_second_run_goes_on(
    sentence_transformer: Path,
    narrow: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "frontier"
    asked = ("frontier", sentence_transformer, narrow, "--text", text, "--other", text, "-o", out)
    asked += ("--target", "onnx:fp32", *FAST)
    record = run(*asked)
    assert record == json.loads((out / "frontier.json").read_text())
    assert (out / "frontier.png").is_file()
    points = {p["model"]: p for p in record["points"]}
    assert list(points) == ["original", "narrow"]
    options = SentenceOptions(source=text, batch=4, seqlen=16)
    quality = evaluate(narrow, sentence_transformer, options)
    for on in points["narrow"]["texts"]:
        # onnxruntime and torch sum in another order.
        assert on["cosine"] == pytest.approx(quality["cosine"], abs=1e-5)
        assert on["recall_at_10"] == pytest.approx(quality["recall_at_10"], abs=0.01)
    assert points["original"]["texts"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert points["narrow"]["num_bytes"] < points["original"]["num_bytes"]
    for one in points.values():
        assert len(one["sentences_s"]) == 2
        assert min(one["sentences_s"]) > 0
    assert record["workload"] == {
        "batch": 4,
        "seqlen": 16,
        "threads": 1,
        "rounds": 2,
        "seconds": 0.0,
    }
    assert sum(line.startswith("For embedding") for line in record["verdict"]) == 1
    # What is known stays.
    monkeypatch.setattr(encoder_frontier, "compare", None)
    monkeypatch.setattr(encoder_frontier, "write_artifact", None)
    again = run(*asked, "--no-times")
    assert [p["texts"] for p in again["points"]] == [p["texts"] for p in record["points"]]
    assert again["workload"] is None


def test_a_head_is_judged_by_its_answers(made: Made, text: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "roberta")
    asked = ("--target", "onnx:fp32", "--target", "onnx:int8", "--no-times")
    record = run("frontier", model, "--text", text, *asked, "--samples", 32, "--batch", 8)
    assert [p["precision"] for p in record["points"]] == ["fp32", "int8"]
    for one in record["points"]:
        [on] = one["texts"]
        assert 0 <= on["agreement"] <= 1
    exact, rounded = (p["texts"][0]["kl"] for p in record["points"])
    assert abs(exact) < 1e-5
    assert rounded > 10 * abs(exact)
    assert any("--other" in note for note in record["notes"])


def test_requests_that_cannot_be_met_are_refused(
    sentence_transformer: Path, narrow: Path, made: Made, text: str, tmp_path: Path
) -> None:
    asked = ("frontier", sentence_transformer, "--text", text)
    with pytest.raises(UsageError, match="expected one target"):
        run(*asked, "--target", "onnx", "--target", "openvino")
    with pytest.raises(UsageError, match="holds no text encoder"):
        run(*asked, "--target", "gguf")
    with pytest.raises(UsageError, match="more than the 40 tokens"):
        run(*asked, "--seqlen", 64)
    stranger = made(tmp_path / "stranger", "roberta")
    with pytest.raises(UsageError, match="give outputs of this original"):
        run("frontier", sentence_transformer, stranger, "--text", text, "--no-times")
    spoilt = Path(shutil.copytree(narrow, tmp_path / "spoilt"))
    with (spoilt / "hf/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match="not what was exported"):
        run("frontier", sentence_transformer, spoilt, "--text", text, "--no-times")


def test_the_verdict_speaks_of_cosines() -> None:
    def point(model: str, mb: int, cosine: float, rate: float) -> EncoderPoint:
        on = OnSentences(source="a.txt", num_sentences=9, cosine=cosine, recall_at_10=0.5)
        size = {"num_bytes": mb * 1_000_000, "num_parameters": 1, "precision": "int8"}
        return EncoderPoint(model=model, texts=(on,), sentences_s=(rate, rate), **size)

    points = (point("original", 8, 0.999, 100), point("narrow", 6, 0.95, 150))
    found = Frontier(target="onnx", points=points, skipped=(), notes=(), workload=None)
    assert verdict(found) == [
        "For bytes alone, quantise the original (int8): at equal bytes nothing narrowed is ahead.",
        "Smaller than anything of the original: narrow in int8 (6.00 MB, cosine 0.9500).",
        "For embedding, narrow: 1.50x in every round (narrow in int8 150.0 sentences/s, original "
        "in int8 100.0; cosine 0.9500 and 0.9990).",
    ]
    assert plot(found).png.startswith(b"\x89PNG")
    assert plot(found).rows[0][:5] == ("narrow", "int8", 6.0, 0.95, 0.5)
