"""Labelled rows: metrics are those of other libraries, answers are read where they stand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics

from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_options import SentenceOptions
from dotexport.encoders.labelled import answer_scores, class_scores, scores
from dotexport.encoders.sentences import Batch, batches, read_sentences
from dotexport.errors import CalibrationError, UsageError

from .command import run

Made = Callable[[Path, str], Path]
WORDS = [f"w{n}" for n in range(60)]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_classes_are_those_of_sklearn(classes: int) -> None:
    dice = np.random.default_rng(0)
    labels_N = dice.integers(classes, size=200)
    said_N = np.where(dice.random(200) < 0.6, labels_N, dice.integers(classes, size=200))
    found = class_scores(said_N, labels_N, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels_N, said_N))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels_N, said_N, average=average))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels_N, said_N))


def test_one_class_alone_correlates_with_nothing() -> None:
    ones = np.ones(5, dtype=int)
    assert class_scores(ones, ones, 2) == {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}


def test_articles_case_and_punctuation_of_answers_do_not_count() -> None:
    told = answer_scores(["the Eiffel Tower!", "in 1889, Paris", "", "lead"], [
        ["Eiffel tower"], ["1889", "Paris in 1889"], [""], ["tin", "copper"],
    ])  # fmt: skip
    assert told["exact_match"] == pytest.approx(2 / 4)  # words of the second are in another order
    assert told["f1"] == pytest.approx(3 / 4)


def test_a_number_is_a_label_where_a_class_is_called_by_another(made: Made, tmp_path: Path) -> None:
    encoder = open_encoder(made(tmp_path / "model", "roberta"))
    encoder.model.config.label2id = {"1": 0, "2": 1, "3": 2}  # type: ignore[union-attr]
    rows = [{"text": "w1", "label": 1}, {"text": "w2", "label": "2"}]

    def say(read: Batch) -> dict[str, torch.Tensor]:
        return {"logits": torch.tensor([0.0, 1.0, 0.0]).expand(len(read.inputs["input_ids"]), 3)}

    assert scores(encoder, say, rows, SentenceOptions(source="unread"))["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["distilbert", "modernbert-QuestionAnswering"])
def test_an_answer_is_found_in_whichever_window_it_stands(
    name: str, made: Made, tmp_path: Path
) -> None:
    """Asked is a model that knows the word: contexts are up to five times as long as it reads."""
    encoder = open_encoder(made(tmp_path / "model", name))
    dice = random.Random(0)
    rows = []
    for length in (3, 20, 60, 160):
        for place in (0, length // 2, length - 2):
            words = dice.choices(WORDS[:50], k=length)
            words[place : place + 2] = ["w55", "w56"]
            asked = " ".join(dice.choices(WORDS[:50], k=30))  # more than half of what it reads
            answers = {"text": ["w55 w56"], "answer_start": [0]}
            rows.append({"context": " ".join(words), "question": asked, "answers": answers})
    vocabulary = json.loads((encoder.home / "tokenizer.json").read_text())["model"]["vocab"]

    def say(read: Batch) -> dict[str, torch.Tensor]:
        assert read.inputs["input_ids"].shape[1] <= 40
        ids = read.inputs["input_ids"]
        ends = (("start", "w55"), ("end", "w56"))
        return {f"{end}_logits": (ids == vocabulary[word]).float() for end, word in ends}

    options = SentenceOptions(source="unread", batch=4)
    assert scores(encoder, say, rows, options) == {"exact_match": 1.0, "f1": 1.0}


def test_the_narrowed_model_is_right_where_it_says_what_the_original_does(
    made: Made, text: str, tmp_path: Path
) -> None:
    """Labels are what the original says of pairs, by name or by number."""
    model, out = made(tmp_path / "model", "roberta"), tmp_path / "out"
    encoder = open_encoder(model)
    dice = random.Random(1)
    rows: list[dict[str, Any]] = []
    for number in range(40):
        pair = {f"sentence{n}": " ".join(dice.choices(WORDS, k=6)) for n in (1, 2)}
        read = tokens(encoder.home, pair)
        with torch.no_grad():
            label = int(encoder.model(**read).logits.argmax())
        rows.append({**pair, "label": f"LABEL_{label}" if number % 2 else label})
    asked = ["--labelled", write(tmp_path / "rows.jsonl", rows)]
    run("shrink", model, "-o", out, "--intermediate", 16, "--calib", text)
    found = run("eval", out, "--baseline", model, "--text", text, *asked)["labelled"]
    assert found["rows"] == 40
    assert found["original"]["accuracy"] == 1.0
    narrowed = open_encoder(out)
    with torch.no_grad():
        alike = [
            narrowed.model(**tokens(narrowed.home, row)).logits.argmax().item()
            == encoder.model(**tokens(encoder.home, row)).logits.argmax().item()
            for row in rows
        ]
    assert found["narrowed"]["accuracy"] == pytest.approx(sum(alike) / 40)
    assert "accuracy of 40 labelled rows" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["roberta", "distilbert", "xlm-roberta"])
def test_a_model_learns_from_rows_what_it_is_asked(name: str, made: Made, tmp_path: Path) -> None:
    """Pairs calibrate and distil as pairs; answers of a head come nearer to the original's."""
    dice = random.Random(1)
    said = [[" ".join(dice.choices(WORDS, k=6)) for _ in range(2)] for _ in range(200)]
    rows = [{"question": one, "context": two, "answers": [two[:2]]} for one, two in said]
    text = write(tmp_path / "rows.jsonl", rows)
    held = write(tmp_path / "held.jsonl", rows[150:])
    model, divergence = made(tmp_path / "model", name), {}
    [first, *_] = batches(open_encoder(model), read_sentences(asked_of(text)), asked_of(text))
    assert (first.inputs["input_ids"] == 2).sum(-1).tolist() == [2] * 32  # [SEP] behind each
    for steps in (0, 40):
        out = tmp_path / f"out{steps}"
        run("shrink", model, "-o", out, "--layers", 2, "--heal", steps, "--calib", text,
            "--samples", 128)  # fmt: skip
        divergence[steps] = run("eval", out, "--baseline", model, "--text", held)["kl"]
    assert divergence[40] < 0.95 * divergence[0]  # forty steps of weights that say nothing


def asked_of(file: Path) -> SentenceOptions:
    return SentenceOptions(source=str(file))


def tokens(home: Path, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(home)(
        row["sentence1"], row["sentence2"], return_tensors="pt"
    )
    return {name: read[name] for name in ("input_ids", "attention_mask")}


QUESTION = {"context": "w1 w2", "question": "w3", "answers": ["w1"]}


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("roberta", '{"text": "w1", "label": 3}', "expected one of LABEL_0 \\(0\\)"),
        ("roberta", '{"text": "w1"}', "row 1 has label None"),
        ("roberta", '{"words": "w1", "label": 0}', "row 1 has no text"),
        ("roberta", '{"text": "w1", "label": 0}\n{"label": 0}', "row 2 has no text"),
        ("roberta", "w1 w2", "line 1 is no JSON"),
        ("roberta", "[1]", "line 1 is no object"),
        ("roberta", "", "holds no rows"),
        ("distilbert", '{"context": "w1", "question": "w2"}', "row 1 is no question"),
        ("distilbert", json.dumps(QUESTION | {"answers": {"text": []}}), "row 1 is no question"),
        ("masked", '{"text": "w1", "label": 0}', "BertForMaskedLM answers no labelled rows"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(
    name: str, lines: str, says: str, made: Made, tmp_path: Path
) -> None:
    from dotexport.encoders.rows import read_rows

    file = tmp_path / "rows.jsonl"
    file.write_text(lines, encoding="utf-8")
    encoder = open_encoder(made(tmp_path / "model", name))

    def say(read: Batch) -> dict[str, torch.Tensor]:
        return {"logits": torch.zeros(len(read.inputs["input_ids"]), 3)}

    with pytest.raises((CalibrationError, UsageError), match=says):
        scores(encoder, say, read_rows(file), SentenceOptions(source="unread"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "w1", "context": "w2"}', "holds 2 rows of a task; expected"),
        ('{"text": "w1 w2 w3 w4 w5 w6"}', "holds 2 sentences of"),
    ],
)
def test_what_is_too_little_is_said_of_what_a_file_holds(
    line: str, says: str, tmp_path: Path
) -> None:
    (file := tmp_path / "few.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=says):
        read_sentences(SentenceOptions(source=str(file)))
