"""Tasks: answers are those of lm-evaluation-harness' own model, offline, for artifacts as well."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from dotexport.app.evaluations import check_eval, sides_of, tasks_of
from dotexport.app.steps import EvalStep
from dotexport.embedded import MODEL_DIR
from dotexport.errors import CalibrationError, RuntimeMissingError, UsageError
from dotexport.exports.exporting import export
from dotexport.exports.target import find_target
from dotexport.models.text_windows import read_tokenizer
from dotexport.narrowing.prepare import pick_device
from dotexport.options import build
from dotexport.tasks.task_options import TaskOptions

pytest.importorskip("lm_eval")

from dotexport.tasks import asking
from dotexport.tasks.asking import SessionModel, ask, likelihood, table

CHOICES = [
    {"query": f"import {name}", "choices": ["as a", "banana split now", "x"], "gold": n % 3}
    for n, name in enumerate(["os", "sys", "json", "re", "math", "csv", "ast"])
]
PASSAGES = [  # the embedded model knows some of them
    {"context": context, "continuation": word}
    for context, word in [
        ("from __future__ import", "annotations"),
        ("import numpy as", "np"),
        ("if value is not", "None"),
        ("    def f(self) ->", "None"),
        ("for key, value in", "items"),
        ("except ValueError as", "error"),
    ]
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("piqa", "arc_easy", "copa"):
        write_rows(folder / f"{name}.jsonl", CHOICES)
    write_rows(folder / "lambada_openai.jsonl", PASSAGES)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def model() -> SessionModel:
    session = find_target("hf").open(MODEL_DIR)
    return SessionModel(session, read_tokenizer(MODEL_DIR), context=512, vocabulary=4096)


def options(data: Path, *names: str, limit: int | None = None) -> TaskOptions:
    return TaskOptions(tasks=",".join(names), data=str(data), limit=limit)


def test_likelihoods_are_sums_of_log_probabilities() -> None:
    logits = np.log(np.array([[0.2, 0.8], [0.5, 0.25]], dtype=np.float32))
    found, greedy = likelihood(logits, [1, 0])
    assert found == pytest.approx(math.log(0.8) + math.log(2 / 3), abs=1e-6)
    assert greedy
    assert likelihood(logits, [1, 1])[1] is False


def test_answers_are_those_of_the_harness_own_model(model: SessionModel, data: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
        tokenizer=read_tokenizer(MODEL_DIR),
        batch_size=1,
        device="cpu",
    )
    asked = options(data, "lambada_openai", "piqa")
    ours, wanted = ask(model, asked), ask(theirs, asked)
    assert ours["results"].keys() == wanted["results"].keys() == {"lambada_openai", "piqa"}
    for task, found in ours["results"].items():
        for key in ("acc,none", "acc_stderr,none", "acc_norm,none"):
            assert found.get(key) == wanted["results"][task].get(key), (task, key)
        for one, other in zip(ours["samples"][task], wanted["samples"][task], strict=True):
            for (ours_log, _), (their_log, _) in zip(
                one["filtered_resps"], other["filtered_resps"], strict=True
            ):
                # Sums of a few float32 log-probabilities of the order of 10.
                assert ours_log == pytest.approx(their_log, abs=1e-3)


def test_a_question_beyond_the_context_loses_its_start(model: SessionModel) -> None:
    long = model.tok_encode("value = " * 600)
    answer = model.tok_encode("value")
    (found,) = model._loglikelihood_tokens([(("", ""), long, answer)])
    (cut,) = model._loglikelihood_tokens([(("", ""), long[-512 + len(answer) - 1 :], answer)])
    assert len(long) > 600
    assert found == cut


def test_batches_change_no_answer(model: SessionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        (("", ""), model.tok_encode("import os\n" * n), model.tok_encode("import"))
        for n in (1, 9, 3)
    ]
    together = model._loglikelihood_tokens(requests)
    monkeypatch.setattr(asking, "LOGITS_BYTES", 1)
    assert len(list(model._batches(requests))) == 3
    alone = model._loglikelihood_tokens(requests)
    for (one, _), (other, _) in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_last_words_are_those_of_the_bench(model: SessionModel, data: Path) -> None:
    from dotexport.bench.tables.last_words import accuracy

    wanted = accuracy(MODEL_DIR, data / "lambada_openai.jsonl", 6)
    found = ask(model, options(data, "lambada_openai"))["results"]["lambada_openai"]["acc,none"]
    assert found == pytest.approx(wanted)
    assert 0 < found < 1


def test_local_questions_need_no_network_and_artifacts_answer_as_torch_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> NoReturn:
        raise AssertionError("something asked for the network")

    out = tmp_path / "out"
    export(MODEL_DIR, ["hf", "ort-cpu"], out=out)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    sides = sides_of(out, MODEL_DIR, ["ort-cpu"], pick_device("cpu"))
    names = ("lambada_openai", "piqa", "arc_easy", "copa")
    told: list[int] = []
    rows = tasks_of(sides, options(data, *names, limit=4), lambda stage, n, total: told.append(n))
    assert {(row["task"], row["metric"]) for row in rows} == {
        ("lambada_openai", "acc"),
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("copa", "acc"),
    }
    for row in rows:
        assert row["questions"] == 4
        original, stock, artifact = row["models"].values()
        assert list(row["models"]) == ["original", "hf", "ort-cpu-fp32"]
        assert original["error"] is not None
        assert stock["value"] == artifact["value"] == original["value"]
        assert (stock["gap"], stock["gap_error"]) == (0, 0)
    assert told


def test_gaps_are_paired_by_question() -> None:
    def found(values: list[float]) -> dict[str, Any]:
        results = {"t": {"acc,none": float(np.mean(values)), "acc_stderr,none": 0.1, "alias": "t"}}
        samples = [{"doc_id": n, "acc": value} for n, value in enumerate(values)]
        return {"results": results, "samples": {"t": samples}}

    one, two = [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    (row,) = table({"original": found(one), "hf": found(two)}, "original")
    assert row["models"]["hf"]["gap"] == -0.25
    assert row["models"]["hf"]["gap_error"] == pytest.approx(0.25)
    assert row["models"]["original"] == {"value": 0.5, "error": 0.1}


def test_a_metric_that_is_no_mean_has_no_paired_error() -> None:
    def found(value: float) -> dict[str, Any]:
        samples = [{"doc_id": n, "perplexity": -1.0} for n in range(3)]
        return {"results": {"t": {"perplexity,none": value}}, "samples": {"t": samples}}

    (row,) = table({"original": found(2.7), "hf": found(3.7)}, "original")
    assert row["models"]["hf"]["gap"] == pytest.approx(1.0)
    assert row["models"]["hf"]["gap_error"] is None


def test_questions_that_cannot_be_read_are_named(model: SessionModel, data: Path) -> None:
    (data / "copa.jsonl").write_text('{"query": "a", "choices": ["b"], "gold": 0}\n{"que')
    with pytest.raises(CalibrationError, match=r"copa.jsonl, line 2 is not JSON"):
        ask(model, options(data, "copa"))
    (data / "copa.jsonl").write_text("[1]\n")
    with pytest.raises(CalibrationError, match=r"copa.jsonl, line 1 is no JSON object"):
        ask(model, options(data, "copa"))


def test_a_task_that_nobody_knows_is_refused(model: SessionModel, data: Path) -> None:
    with pytest.raises(UsageError, match="no_such_task is unknown to lm-evaluation-harness"):
        ask(model, options(data, "no_such_task"))


@pytest.mark.parametrize("method", ["loglikelihood_rolling", "generate_until"])
def test_tasks_that_ask_for_more_are_refused(model: SessionModel, method: str) -> None:
    with pytest.raises(UsageError, match="a task asks"):
        getattr(model, method)([])


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dotexport.tasks.asking")
    step = build(EvalStep, text="held-out.txt", tasks="piqa")
    with pytest.raises(RuntimeMissingError, match=r"pip install 'dotexport\[tasks\]'") as refused:
        check_eval(step, [])
    assert refused.value.exit_code == 6


def test_a_recipe_that_judges_what_it_does_not_export_is_refused() -> None:
    step = build(EvalStep, text="held-out.txt", target="ort-cpu:int4,hf")
    check_eval(step, ["ort-cpu"])
    with pytest.raises(UsageError, match="artifacts of ort-cpu, which the recipe does not export"):
        check_eval(step, ["gguf"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"limit": 3}, "--tasks-data and --limit are for --tasks"),
        ({"tasks": "piqa", "limit": 0}, "--limit must be at least 1"),
        ({"tasks": "piqa,"}, "empty name"),
    ],
)
def test_options_that_say_nothing_clear_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TaskOptions(**given)


def test_questions_lie_where_the_variable_says(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TaskOptions(tasks="piqa").definition("piqa") is None
    monkeypatch.setenv("DOTEXPORT_TASKS_DATA", str(data))
    found = TaskOptions(tasks="piqa").definition("piqa")
    assert found is not None
    assert found[1] == data / "piqa.jsonl"
    assert TaskOptions(tasks="piqa").definition("hellaswag") is None
    monkeypatch.setenv("DOTEXPORT_TASKS_DATA", str(data / "nowhere"))
    with pytest.raises(UsageError, match="nowhere is no folder"):
        TaskOptions(tasks="piqa").definition("piqa")
