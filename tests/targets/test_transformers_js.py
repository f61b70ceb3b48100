"""What transformers.js generates in Node from decoders that are written for it.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dotexport.exports.exporting import export
from dotexport.exports.target import find_target

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.transformersjs

GENERATE = """
const { model, tokenizer } = await load("text-generation");
const made = [];
for (const text of texts) {
  const tokens = await model.generate({ ...tokenizer(text), max_new_tokens: 16, do_sample: false });
  const [said] = tokens.tolist();
  made.push({ tokens: said.map(Number), text: tokenizer.decode(said) });
}
say(made);
"""
PROMPTS = ["Once upon a time", "def add(a, b):\n    return", "Größe — 中文 \t x"]
END = 0


def greedy(model: Path, prompt: str) -> list[int]:
    """The prompt and 16 tokens after it, as transformers generates them."""
    inputs = read(model, prompt)
    decoder: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    said = decoder.generate(torch.tensor([inputs]), max_new_tokens=16, do_sample=False)
    tokens: list[int] = said[0].tolist()
    return tokens


def greedy_of(artifact: Path, prompt: str) -> list[int]:
    """The same from an artifact, in the session that `verify` holds against torch."""
    said, session = read(artifact, prompt), find_target("onnx").open(artifact)
    logits_V = session.start(np.array([said]))[0, -1]
    for _ in range(16):
        said.append(int(logits_V.argmax()))
        if said[-1] == END:
            break
        logits_V = session.step(np.array(said[-1:]))[0]
    return said


def read(folder: Path, text: str) -> list[int]:
    tokens: list[int] = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return tokens


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.heavy), "odd"])
def test_a_narrowed_decoder_says_in_node_what_it_says_in_torch(
    name: str, narrowed: Callable[[str], Path], translated_once: None, in_node: Any
) -> None:
    """odd is a Granite whose heads do not divide its width."""
    out = narrowed(name)
    rounded = ["fp16", "int8", "int4", "int4-fp16"]
    export(out, [f"onnx:{precision}" for precision in ("fp32", *rounded)], verify=False)
    decode = transformers.AutoTokenizer.from_pretrained(out / "hf").decode
    for prompt, said in zip(PROMPTS, in_node(GENERATE, out / "onnx-fp32", PROMPTS), strict=True):
        assert said["tokens"] == greedy(out / "hf", prompt)
        assert said["text"] == decode(said["tokens"])
    # Rounded, a token nearly as likely as torch's may win: the same graph says which.
    for artifact in (out / f"onnx-{precision}" for precision in rounded):
        for prompt, said in zip(PROMPTS, in_node(GENERATE, artifact, PROMPTS), strict=True):
            assert said["tokens"] == greedy_of(artifact, prompt)
