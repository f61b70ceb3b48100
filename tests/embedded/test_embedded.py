"""The embedded model is what its card says, and the held-out lists are really held out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dotexport.embedded import (
    CALIBRATION,
    EVALUATION,
    MODEL_DIR,
    calibration_text,
    evaluation_text,
)
from dotexport.embedded.corpus import SOURCES, Closeness, _files
from dotexport.embedded.held_out import read_modules, standard_library
from dotexport.embedded.loss import held_out_loss
from dotexport.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def _on_the_card(metric: str) -> float:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"type: {metric}, value: ([0-9.]+)", card)
    assert found, f"the card does not state {metric}"
    return float(found[1])


def test_the_held_out_lists_are_disjoint_and_installed() -> None:
    assert not set(EVALUATION) & set(CALIBRATION)
    for module in EVALUATION + CALIBRATION:
        assert (standard_library() / module).is_file(), module


def test_the_held_out_texts_have_the_size_that_measuring_needs() -> None:
    assert 250_000 < sum(map(len, evaluation_text())) < 500_000
    assert 900_000 < sum(map(len, calibration_text())) < 1_600_000


def test_no_held_out_file_is_read_for_training() -> None:
    held_out = {standard_library() / module for module in EVALUATION + CALIBRATION}
    assert not held_out & set(_files(SOURCES[0]))


def test_a_vendored_copy_of_a_held_out_module_is_found() -> None:
    closeness = Closeness(evaluation_text())
    lines = evaluation_text()[0].splitlines()
    assert closeness.is_close("# vendored\n" + "\n".join(lines[20:]))
    assert not closeness.is_close(Path(ast.__file__).read_text(encoding="utf-8"))


def test_a_missing_module_is_named_in_the_error() -> None:
    with pytest.raises(CalibrationError, match=r"no_such_module\.py is missing"):
        read_modules(["no_such_module.py"])


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, dotexport.embedded; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tokenizer_gives_back_every_byte(tokenizer) -> None:
    assert tokenizer.is_fast
    for text in (*evaluation_text()[:3], "\tfür\r\n  日本 \x00 🙂\u200d\n\n   "):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


def test_the_folder_fits_into_sixteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 16e6


def test_the_loss_on_the_card_is_the_loss_of_the_weights(model, tokenizer) -> None:
    loss = held_out_loss(model, tokenizer, evaluation_text())
    # Modules change a little from one Python to the next; on the same one it is 1e-3.
    assert loss.nats_per_token == pytest.approx(_on_the_card("nats_per_token"), rel=0.05)
    assert loss.bits_per_character == pytest.approx(_on_the_card("bits_per_character"), rel=0.05)


def test_the_held_out_loss_is_that_of_a_trained_model() -> None:
    # The same text costs 1.86 bits per character under gzip -9, 1.62 under xz.
    assert _on_the_card("bits_per_character") <= 1.40


# Each ends where a token ends; after a trailing space the model goes astray, as its card says.
@pytest.mark.parametrize("prompt", ["def", "import os\n", "class Reader("])
def test_greedy_text_begins_as_python_that_parses(model, tokenizer, prompt: str) -> None:
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    row = model.generate(start, max_new_tokens=80, do_sample=False)[0]
    lines = tokenizer.decode(row, skip_special_tokens=True).splitlines()
    assert _longest_valid_beginning(lines) >= 2


def _longest_valid_beginning(lines: list[str]) -> int:
    """How many lines from the top parse as Python; the end of a sample is always cut off."""
    for count in range(len(lines), 0, -1):
        try:
            ast.parse("\n".join(lines[:count]))
        except SyntaxError:
            continue
        return count
    return 0
