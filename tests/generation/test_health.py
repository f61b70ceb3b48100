"""Continuations: figures are what their words say, and a collapse is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.app.evaluations import generation_of, sides_of
from dotexport.exports.exporting import export
from dotexport.exports.target import find_target
from dotexport.generation import health
from dotexport.generation.generation_options import GenerationOptions
from dotexport.generation.health import Continuation, judge, loop_of, repetition
from dotexport.generation.starts import Starts
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.prepare import pick_device


def said(*ids: int, ended: bool = False) -> Continuation:
    return Continuation(ids, "".join(f"{n}," for n in ids), ended)


def decode(ids: list[int]) -> str:
    return "".join(f"{n}," for n in ids)


def test_repetition_counts_what_stood_there_before() -> None:
    assert repetition(range(40)) == 0
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert repetition([1, 2]) == 0


def test_a_loop_is_a_piece_that_is_said_to_the_end() -> None:
    assert loop_of([9] * 12) == (9,)
    assert loop_of([9] * 11) is None
    assert loop_of([*range(5), *[6, 7, 8, 9, 5] * 3]) == (6, 7, 8, 9, 5)
    assert loop_of([*[6, 7, 8, 9, 5] * 3, 1]) is None
    assert loop_of(list(range(30))) is None


def test_agreement_counts_texts_that_begin_alike() -> None:
    theirs = [said(1, 2, 3, 4), said(1, 2, ended=True), said(5, 6, 7, 8)]
    ours = [said(1, 2, 9, 9), said(1, 2, ended=True), said(4, 6, 7, 8)]
    found = judge("hf", "plain", ours, theirs, decode)
    assert found.agreement == pytest.approx({1: 2 / 3, 2: 2 / 3, 4: 1 / 3})
    assert judge("hf", "plain", theirs, theirs, decode).agreement == {1: 1, 2: 1, 4: 1}


def test_an_end_that_only_one_comes_to_is_no_agreement() -> None:
    theirs = [said(1, ended=True), said(1, 2, 3, 4)]
    found = judge("hf", "plain", [said(1, 2, 3, 4), said(1, ended=True)], theirs, decode)
    assert found.agreement == {1: 1, 2: 0, 4: 0}


def test_a_collapse_is_said_in_words_and_the_originals_own_loops_are_not() -> None:
    well = [said(*range(n, n + 40), ended=True) for n in range(4)]
    looping = [said(*range(8), *[7, 8] * 20) for _ in range(4)]
    (words,) = judge("hf", "plain", looping, well, decode).words[:1]
    assert words.startswith("it repeats itself: 4 of 4 continuations end in a loop (of the")
    assert judge("hf", "plain", looping, looping, decode).words == ()
    assert judge("hf", "plain", well, well, decode).words == ()
    assert [w.partition(":")[0] for w in judge("hf", "chat", looping, well, decode).words] == [
        "it repeats itself",
        "it does not stop",
    ]
    silent = judge("hf", "chat", [said(ended=True)] * 4, well, decode)
    assert [w.partition(":")[0] for w in silent.words] == ["it says nothing"]


def test_long_phrases_that_come_again_are_said_too() -> None:
    phrase = list(range(25))
    ours, theirs = [said(*phrase, *phrase, *phrase)] * 4, [said(*range(75))] * 4
    (words,) = judge("hf", "plain", ours, theirs, decode).words
    assert words.startswith("it repeats itself: 65 % of its 4-grams")


def test_continuations_are_those_of_generate(assets: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = assets / "stories260k"
    starts = Starts.of(folder)
    prompts = ["Once upon a time", "Lily", "The big dog ran"]
    session = find_target("hf").open(folder)
    found = health.continued(session, starts, prompts, health.PLAIN, 24)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = starts.tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert list(continuation.ids) == wanted.tolist()
        assert continuation.text == starts.tokenizer.decode(wanted)


class Ending:
    """Says 5, 6, 2 behind the first prompt and 5, 6, 7, 8, ... behind the second."""

    def start(self, tokens_BL: Any, lengths_B: Any) -> Any:
        logits = np.zeros((*tokens_BL.shape, 90), dtype=np.float32)
        for row, length in enumerate(lengths_B):
            logits[row, length - 1, 5] = 1
        self.said = 5
        return logits

    def step(self, tokens_B: Any) -> Any:
        self.said += 1
        logits = np.zeros((len(tokens_B), 90), dtype=np.float32)
        logits[:, self.said] = 1
        if self.said == 7:
            logits[0, 2] = 2
        return logits


def test_a_continuation_ends_at_an_end_token(tiny_llama: Callable[[str], Path]) -> None:
    starts = Starts.of(tiny_llama("wide-heads"))
    one, two = health.continued(Ending(), starts, ["w1 w2", "w1"], health.PLAIN, 5)
    assert (one.ids, one.ended) == ((5, 6), True)
    assert (two.ids, two.ended) == ((5, 6, 7, 8, 9), False)


def test_artifacts_say_what_torch_says(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(assets / "stories260k", ["hf", "ort-cpu"], out=out)
    text = TextOptions(source=str(assets / "tinystories/train-2MiB.txt"), seqlen=32)
    sides = sides_of(out, assets / "stories260k", ["ort-cpu"], pick_device("cpu"))
    options = GenerationOptions(prompts=4, tokens=16)
    found = generation_of(sides, text, options, lambda *_: None)
    assert [(row["model"], row["kind"]) for row in found["rows"]] == [
        ("original", "plain"),
        ("hf", "plain"),
        ("ort-cpu-fp32", "plain"),
    ]
    assert found["rows"][2]["agreement"] == {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}


def test_questions_go_through_the_chat_template(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model(model_type="llama"), tmp_path / "chatting")
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    (model / "chat_template.jinja").write_text(template)
    (prompt,) = health.chat_prompts(Starts.of(model), 1)
    assert prompt == f"<s>{health.QUESTIONS[0]}</s><s>"
    assert health.chat_prompts(Starts.of(tiny_model(model_type="llama")), 1) == []
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    sides = sides_of_checkpoint(model, tmp_path)
    asked = TextOptions(source=str(text), seqlen=32)
    found = generation_of(sides, asked, GenerationOptions(prompts=2, tokens=8), lambda *_: None)
    assert {row["kind"] for row in found["rows"]} == {"plain", "chat"}
    assert json.loads(json.dumps(found)) is not None


def sides_of_checkpoint(model: Path, tmp_path: Path) -> Any:
    export(model, ["hf"], out=tmp_path / "out")
    return sides_of(tmp_path / "out", model, [], pick_device("cpu"))
