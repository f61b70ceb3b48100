"""LiteRT-LM files: what LiteRT-LM itself makes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotexport.embedded import MODEL_DIR
from dotexport.errors import CheckpointError
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint

pytest.importorskip("litert_torch")
litert_lm: Any = pytest.importorskip("litert_lm")

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("litert")
    find_target("litert").write(Checkpoint.open(MODEL_DIR), folder, "fp32")
    return folder


def test_the_engine_of_litert_lm_says_what_torch_says(artifact: Path) -> None:
    """By its own prefill, cache and tokenizer, which the session of `verify` does without."""
    engine = litert_lm.Engine(str(artifact / "model.litertlm"), cache_dir=":nocache")
    session = engine.create_session()
    session.run_prefill([PROMPT])
    [said] = session.run_decode().texts
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    asked = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens_L = model.generate(asked, max_new_tokens=32, do_sample=False)[0, asked.shape[1] :]
    wanted = tokenizer.decode(tokens_L, skip_special_tokens=True)
    assert len(wanted) > 20
    assert said.startswith(wanted)


def test_a_file_that_is_cut_short_is_named(artifact: Path, tmp_path: Path) -> None:
    content = (artifact / "model.litertlm").read_bytes()
    for name, kept in (("short", content[:10]), ("foreign", b"no model" * 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.litertlm").write_bytes(kept)
        with pytest.raises(CheckpointError, match="export it again"):
            find_target("litert").open(tmp_path / name)


def test_a_class_that_was_not_tried_is_refused() -> None:
    config = Checkpoint.open(MODEL_DIR).config
    target: Any = find_target("litert")
    assert target.config_problems(config, "int8") == []
    [problem] = target.config_problems({**config, "model_type": "olmo2"}, "int8")
    assert "olmo2 has not been tried" in problem
