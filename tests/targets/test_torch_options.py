"""Torch in other dtypes, on other devices, and compiled: the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.target import find_target
from dotexport.targets.hf import HuggingFace

VOCAB = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    out = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture
def target() -> HuggingFace:
    found = find_target("hf")
    assert isinstance(found, HuggingFace)
    return found


def answers(session: object, lengths: list[int] | None = None) -> list[np.ndarray]:
    """Logits of the last prompt position of each sequence, then of four steps."""
    rng = np.random.default_rng(0)
    prompt_BL, steps_NB = rng.integers(VOCAB, size=(2, 9)), rng.integers(VOCAB, size=(4, 2))
    first = session.start(prompt_BL, lengths)  # type: ignore[attr-defined]
    return [first[:, -1], *(session.step(tokens_B) for tokens_B in steps_NB)]  # type: ignore[attr-defined]


def test_half_precision_is_close_and_says_what_it_is(target: HuggingFace, folder: Path) -> None:
    whole, half = target.open(folder, threads=1), target.open(folder, threads=1, dtype="bf16")
    assert (whole.number, half.number) == ("fp32", "bf16")
    assert half.providers == ("torch on cpu, bf16",)
    for exact, near in zip(answers(whole), answers(half), strict=True):
        assert near.dtype == np.float32
        # bfloat16 keeps 8 bits; two layers of logits near 0.1 stay within a few of the last.
        np.testing.assert_allclose(near, exact, atol=0.02)
        assert not np.array_equal(near, exact)


def test_lean_answers_are_those_of_the_last_position(target: HuggingFace, folder: Path) -> None:
    prompt_BL = np.arange(12).reshape(2, 6)
    every = target.open(folder).start(prompt_BL)
    last = target.open(folder, lean=True).start(prompt_BL)
    assert last.shape == (2, 1, VOCAB)
    np.testing.assert_allclose(last[:, 0], every[:, -1], atol=1e-5)


def test_compiled_decoding_computes_the_same(
    target: HuggingFace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One whole graph is captured as ever; turning it into C++ is torch's part, and takes minutes.
    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, *, mode, **options: real(model, backend="eager", **options),
    )
    plain = target.open(folder, threads=1)
    compiled = target.open(folder, threads=1, compiled=True, capacity=13)
    assert compiled.providers == ("torch on cpu, fp32, decode compiled",)
    # The second time over the same buffers, emptied; then right-padded.
    for lengths in (None, None, [9, 5]):
        for exact, found in list(
            zip(answers(plain, lengths), answers(compiled, lengths), strict=True)
        )[1:]:
            # Another order of summation in float32.
            np.testing.assert_allclose(found, exact, atol=1e-5)
    with pytest.raises(UsageError, match="cache of 13 tokens is full"):
        compiled.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(UsageError, match="does not fit a cache of 13"):
        compiled.start(np.zeros((1, 14), dtype=np.int64))


def test_what_torch_cannot_compile_is_a_missing_runtime(
    target: HuggingFace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: object, **options: object) -> Callable[..., object]:
        def call(**inputs: object) -> object:
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    session = target.open(folder, compiled=True)
    session.start(np.zeros((1, 2), dtype=np.int64))
    with pytest.raises(RuntimeMissingError, match="no compiler here"):
        session.step(np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "fp8"}, UsageError, "dtype 'fp8' is unknown; expected one of fp32"),
        ({"device": "moon"}, UsageError, "device 'moon' is unknown"),
        ({"device": "cuda:77"}, RuntimeMissingError, "cuda:77 was asked for"),
    ],
)
def test_what_is_not_there_is_refused(
    target: HuggingFace, folder: Path, options: dict[str, str], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        target.open(folder, **options)  # type: ignore[arg-type]
