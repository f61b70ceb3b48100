"""Text that cannot serve and requests that cannot be met."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import NARROW, Command, names, refused, shrinking_of, written


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("empty.txt", "", ["empty.txt holds no text"]),
        ("blank.txt", " \n<|endoftext|>\t", ["blank.txt holds no text"]),
        ("short.txt", "w1 " * 31, ["gives 31 tokens", "window of 32", "more text or a smaller"]),
        ("latin.txt", b"caf\xe9", ["latin.txt is not UTF-8", "byte 3", "convert it first"]),
        ("bad.jsonl", '{"text": "w1"}\n{"text": ', ["bad.jsonl, line 2 is not JSON"]),
        ("other.jsonl", '{"text": "w1"}\n\n{"txt": "w1"}', ['line 3 has no "text"', '{"text": ']),
        ("list.jsonl", '["text"]', ['line 1 has no "text"']),
    ],
)
def test_text_that_cannot_serve_is_refused(
    dotexport: Command,
    model: Path,
    tmp_path: Path,
    file: str,
    content: str | bytes,
    words: list[str],
) -> None:
    text = written(tmp_path / file, content)
    refused(dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW)), 1, *words)
    assert names(tmp_path) == sorted([file, "model"])


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("/no/such/file.txt", 1, ["does not exist", ".txt file, .jsonl"]),
        ("no-such-file.jsonl", 1, ["does not exist"]),
        ("embedded:nothing", 1, ["embedded:calibration", "embedded:evaluation"]),
        ("", 2, ["empty name"]),
    ],
)
def test_text_that_is_not_there_is_refused(
    dotexport: Command, model: Path, tmp_path: Path, source: str, code: int, words: list[str]
) -> None:
    outcome = dotexport(*shrinking_of(model, source, tmp_path / "out", *NARROW))
    refused(outcome, code, source, *words)
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--hidden", 42], 5, ["--hidden 42", "multiple of 8", "40 and 48"]),
        (["--hidden", 4], 5, ["the nearest legal: 8"]),
        (["--hidden", 64], 5, ["more than the original's 48", "the nearest legal: 48"]),
        (["--intermediate", 41], 5, ["--intermediate 41", "multiple of 8", "40 and 48"]),
        (["--intermediate", 0], 5, ["the nearest legal: 8"]),
        (["--intermediate", 96], 5, ["more than the original's 88"]),
        (["--params", "0.01x"], 5, ["no legal sizes", "hidden 16, intermediate 24", "0.07x"]),
        (["--params", "0.1x", "--hidden", 48], 5, ["no legal sizes", "hidden 48", "layers 1"]),
        (["--params", "banana"], 2, ["'banana' is no budget", "0.7x, 5.2M"]),
        (["--params", "1.2.3x"], 2, ["is no budget"]),
        (["--params", "0.7"], 2, ["did you mean 0.7x?"]),
        (["--params", "1.5x"], 2, ["at most the original's 102,288"]),
        (["--params", "1e999"], 2, ["at most the original's 102,288"]),
        (["--params", "0x"], 2, ["at least 1"]),
        ([], 2, ["say how narrow", "--params 0.7x"]),
        (["--vocab", 64], 5, ["a tokenizer of kind WordLevel", "expected BPE, Unigram, WordPiece"]),
        (["--vocab", 0], 2, ["--vocab must be at least 1, not 0"]),
        ([*NARROW, "--keep-tokens", "x"], 2, ["give --vocab N or --vocab-for TEXT as well"]),
        (["--kv-heads", 3], 5, ["--kv-heads 3", "more than the original's 2"]),
        (["--kv-heads", 0], 5, ["--kv-heads 0", "between 1 and the original's 2"]),
        (["--size", "9GB"], 2, ["--size 9GB", "at most the original's"]),
        (["--latency", "10ms"], 2, ["without a latency table", "such as 0.8x"]),
        (["--params", "0.7x", "--size", "0.7x"], 2, ["give one budget"]),
        ([*NARROW, "--allocate", "guess"], 2, ["allocate must be one of", "measured", "'guess'"]),
        ([*NARROW, "--heads", "x"], 2, ["heads must be one of", "dot", "'x'"]),
        ([*NARROW, "--ridge", -1], 2, ["ridge must be at least 0, not -1"]),
        ([*NARROW, "--heal", "soon"], 2, ["--heal 'soon'", "local+20M"]),
        ([*NARROW, "--seqlen", 513], 2, ["--seqlen 513", "context of 512 tokens"]),
        ([*NARROW, "--seqlen", 1], 2, ["seqlen must be at least 2, not 1"]),
        ([*NARROW, "--samples", 0], 2, ["samples must be at least 1"]),
        ([*NARROW, "--skip", -1], 2, ["skip must be at least 0"]),
        ([*NARROW, "--seed", 1 << 70], 2, ["seed must be at most"]),
        ([*NARROW, "--samples", 1 << 70], 2, ["samples must be at most 1,073,741,824"]),
        ([*NARROW, "--heal", 1 << 70], 2, ["--heal", "is not known"]),
        ([*NARROW, "--seed", -1], 2, ["seed must be at least 0"]),
        ([*NARROW, "--basis", "x"], 2, ["basis must be one of", "pca", "'x'"]),
        ([*NARROW, "--mlp", "x"], 2, ["mlp must be one of", "dot", "'x'"]),
        ([*NARROW, "--transport", "x"], 2, ["transport must be one of", "balanced", "'x'"]),
        ([*NARROW, "--epsilon", "nan"], 2, ["epsilon must lie between 0 and 10, not nan"]),
        ([*NARROW, "--device", "tpu"], 2, ["--device tpu", "expected auto, cpu, cuda or cuda:1"]),
        ([*NARROW, "--device", "cuda:99"], 6, ["--device cuda:99", "use --device cpu"]),
        ([*NARROW, "--no-such-flag"], 2, ["--no-such-flag"]),
        (["--hidden", "wide"], 2, ["--hidden"]),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    options: list[object],
    code: int,
    words: list[str],
) -> None:
    refused(dotexport(*shrinking_of(model, text, tmp_path / "out", *options)), code, *words)
    assert names(tmp_path) == ["model", "text.txt"]


def test_an_unknown_verb_and_missing_flags_are_usage_errors(
    dotexport: Command, model: Path
) -> None:
    refused(dotexport("shrnk"), 2, "shrnk")
    refused(dotexport("shrink", model), 2, "--out")
