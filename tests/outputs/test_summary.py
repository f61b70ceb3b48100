"""What eval found is told where an output is told: in its rows and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dotexport.bench.report import words
from dotexport.bench.report.collected import Output
from dotexport.models.families import SUPPORTED
from dotexport.outputs import summary
from dotexport.storage.manifest_schema import Quality


def heard(model: str, **figures: Any) -> dict[str, Any]:
    plain = {"repetition": 0.1, "stopped": 0.5, "agreement": {}, "words": []}
    return {"model": model, "kind": "plain"} | plain | figures


LOOP = "it repeats itself: 12 of 16 continuations end in a loop (of the original's 1)"
QUALITY: dict[str, Any] = {
    "perplexity": 30.0,
    "baseline_perplexity": 20.0,
    "kl": 0.4,
    "top1_agreement": 0.7,
    "num_tokens": 100,
    "text": "t.txt",
    "one_source": "the model was calibrated on it",
    "bits_per_byte": [
        {"text": "/texts/t.txt", "models": {"original": 1.0, "hf": 1.25, "sibling": 1.1}}
    ],
    "other": {
        "perplexity": 90.0,
        "baseline_perplexity": 40.0,
        "kl": 0.8,
        "top1_agreement": 0.5,
        "num_tokens": 50,
        "text": "self",
    },
    "generation": {
        "rows": [
            heard("original"),
            heard("hf", repetition=0.9, agreement={"1": 1.0, "2": 0.5}, words=[LOOP]),
            heard("gguf-int4", agreement={"1": 0.75, "2": 0.25}),
        ]
    },
    "tasks": [
        {
            "task": "piqa",
            "metric": "acc",
            "questions": 1838,
            "models": {
                "original": {"value": 0.645, "error": 0.011},
                "hf": {"value": 0.6, "error": 0.011, "gap": -0.045, "gap_error": 0.008},
                "gguf-int4": {"value": 0.59, "error": None, "gap": -0.055, "gap_error": None},
            },
        }
    ],
}


def test_rows_have_what_models_say_and_answer_beside_the_original() -> None:
    found = {row.label: row[1:] for row in summary.rows({"quality": QUALITY})}
    assert found["perplexity, text of the original's own"] == ("40.000", "90.000", "2.250x")
    assert found["bits per byte, t.txt"] == ("1.0000", "1.2500", "1.250x")
    assert found["bits per byte, t.txt, sibling"] == ("1.0000", "1.1000", "1.100x")
    assert found["KL to the original, text of the original's own"] == ("0", "0.8000", "")
    assert found["continuations (plain): 4-grams repeated"] == ("10 %", "90 %", "")
    assert found["continuations (plain): the same for 1, 2 tokens"] == (
        "100 %",
        "100, 50 %",
        "it repeats itself",
    )
    assert found["continuations (plain, gguf-int4): come to an end"] == ("50 %", "50 %", "")
    gap = ("0.645 ± 0.011", "0.600 ± 0.011", "-0.045 ± 0.008")
    assert found["piqa acc, 1,838 questions"] == gap
    assert found["piqa acc, 1,838 questions, gguf-int4"] == ("0.645 ± 0.011", "0.590", "-0.055")


def test_a_report_says_collapse_doubt_and_answers_in_sentences(tmp_path: Path) -> None:
    said = list(words.sentences(Output("out", tmp_path, {"quality": QUALITY})))
    assert "To be doubted: the model was calibrated on it." in said
    assert f"hf, plain: {LOOP}." in said
    assert (
        "piqa, acc over 1,838 questions: 0.645 ± 0.011 (original), 0.600 ± 0.011 (hf), "
        "0.590 (gguf-int4)."
    ) in said


def test_figures_without_an_originals_are_damage() -> None:
    Quality.model_validate(QUALITY)
    rows = {"rows": QUALITY["generation"]["rows"][1:]}
    with pytest.raises(ValidationError, match="original's of kind plain"):
        Quality.model_validate(QUALITY | {"generation": rows})
    task = QUALITY["tasks"][0]
    without = task | {"models": {"hf": task["models"]["hf"]}}
    with pytest.raises(ValidationError, match="must have the original"):
        Quality.model_validate(QUALITY | {"tasks": [without]})


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("LlamaForCausalLM", "ort-cpu:int4"),
        ("Qwen3MoeForCausalLM", "onnx"),
        ("GptOssForCausalLM", "executorch"),
        ("Qwen3_5MoeForCausalLM", None),
        ("Lfm2ForCausalLM", None),
    ],
)
def test_the_next_command_names_a_target_that_takes_the_class(
    architecture: str, target: str | None
) -> None:
    """None: layers keep other states than keys and values, which no graph holds."""
    model_type = SUPPORTED[architecture].model_type
    config = {"architectures": [architecture], "model_type": model_type}
    assert summary._runtime_of(config) == target
