"""What goes wrong, goes wrong well: one message, the documented exit code, nothing half left.

Everything here goes through the command line. A message names the thing, says what was expected
and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dotexport.app import cli, pipeline, shrinking
from dotexport.app.steps import ShrinkStep
from dotexport.errors import CheckpointError
from dotexport.exports import exporting
from dotexport.models import checkpoint
from dotexport.options import build
from dotexport.storage import manifest
from dotexport.targets import BUILT_IN
from dotexport.targets.hf import HuggingFace

UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def dotexport(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """The command line, in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["dotexport", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def model(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break; the vocabulary is w0, w1, ... w86."""
    return shutil.copytree(tiny_llama("wide-heads"), tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return written(tmp_path / "text.txt", "w1 w2 w3 w4 " * 100)


def written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def shrinking_of(model: object, text: object, out: Path, *options: object) -> list[object]:
    """Arguments of a run that takes a fraction of a second."""
    fast = ["--samples", 2, "--seqlen", 32]
    return ["shrink", model, "-o", out, "--calib", text, *fast, *options]


NARROW = ("--intermediate", 40)


class Copy(HuggingFace):
    """A target with a folder of its own that takes no time to write."""

    name = "copy"
    precisions = ("plain",)


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """One message on stderr with these words, this exit code, and nothing on stdout."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Models that cannot be narrowed -----------------------------------------------------------------


def configured(**changes: Any) -> Callable[[Path], object]:
    """Change config.json; None removes the key."""

    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return change


def weighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change the tensors."""

    def rewrite(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", 50_000)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def sharded_but_one(model: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (model / "model.safetensors").rename(model / shards[0])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (model / checkpoint.INDEX).write_text(json.dumps(index))


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "no model folder": (
        lambda m: (m / "config.json").unlink(),
        1,
        ["is not a model folder", "config.json and *.safetensors"],
    ),
    "config is no JSON": (
        lambda m: written(m / "config.json", "{"),
        1,
        ["config.json is not valid JSON", "take a fresh copy"],
    ),
    "config is a list": (
        lambda m: written(m / "config.json", "[]"),
        1,
        ["must hold a JSON object"],
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        1,
        ["lacks model.safetensors", "download the model again"],
    ),
    "pickled weights": (pickled, 1, ["pytorch_model.bin", "save_pretrained"]),
    "missing shard": (
        sharded_but_one,
        1,
        ["lacks model-00002-of-00002.safetensors", "1 of 2", "download"],
    ),
    "broken index": (
        lambda m: written(m / checkpoint.INDEX, '{"weights": {}}'),
        1,
        [checkpoint.INDEX, "expected a weight_map", "download it again"],
    ),
    "truncated weights": (truncated, 1, ["model.safetensors", "truncated", "download it again"]),
    "large-file pointer": (
        lambda m: written(m / "model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        1,
        ["cannot be read as safetensors", "download it again"],
    ),
    "unknown architecture": (
        configured(architectures=["FooForCausalLM"], model_type="foo"),
        5,
        ["FooForCausalLM is not supported", "LlamaForCausalLM", "adding-a-family"],
    ),
    "another model_type": (
        configured(model_type=None),
        1,
        ["model_type = None beside LlamaForCausalLM", "expected 'llama'", "take the config.json"],
    ),
    "quantised": (
        configured(quantization_config={"quant_method": "gptq"}),
        5,
        ["already quantised", "narrow the float model first"],
    ),
    "integer weights": (
        weighted(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        1,
        [UP, "stored as I8", "expected one of F64, F32, F16, BF16"],
    ),
    "NaN": (
        weighted(lambda t: t[UP].fill_(float("nan"))),
        1,
        [UP, "NaN", "expected finite weights", "undamaged copy"],
    ),
    "weights whose activations overflow": (
        weighted(lambda t: t[UP].fill_(3e38)),
        1,
        ["activations on the calibration text are NaN or infinite", "undamaged copy", "bfloat16"],
    ),
    "other shapes": (
        configured(intermediate_size=96),
        1,
        ["mlp.gate_proj.weight has shape (88, 48)", "config.json says (96, 48)"],
    ),
    "missing tensor": (
        weighted(lambda t: t.pop(UP)),
        1,
        [f"lacks 1 of the 30 tensors its config.json calls for, first {UP}", "complete copy"],
    ),
    "foreign tensors": (
        weighted(lambda t: t.update({"model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(3)})),
        1,
        ["LlamaForCausalLM has no place for (1, first", "lora_A", "merge adapters"],
    ),
    "a size that is none": (
        configured(num_attention_heads="four"),
        1,
        ["num_attention_heads = 'four'", "expected a positive integer"],
    ),
    "more layers than any model": (
        configured(num_hidden_layers=10**9),
        1,
        ["num_layers = 1,000,000,000, more than 10,000"],
    ),
    "a context that is none": (
        configured(max_position_embeddings="long"),
        1,
        ["max_position_embeddings", "'long'", "expected"],
    ),
    "no tokenizer": (without_tokenizer, 1, ["has no tokenizer", "tokenizer.json", "expected"]),
    "broken tokenizer": (
        lambda m: written(m / "tokenizer.json", "{"),
        1,
        ["has no tokenizer that transformers can load", "tokenizer.json"],
    ),
    "smaller vocabulary than the tokenizer's": (
        lambda m: (
            weighted(
                lambda t: t.update(
                    {
                        name: t[name][:5].clone()
                        for name in ("model.embed_tokens.weight", "lm_head.weight")
                    }
                )
            )(m),
            configured(vocab_size=5)(m),
        ),
        1,
        ["gives the token", "beyond the model's vocabulary of 5", "belongs to another model"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_be_read_is_refused(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    break_it, code, words = BROKEN[name]
    break_it(model)
    refused(dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW)), code, *words)
    assert names(tmp_path) == ["model", "text.txt"]


def test_the_sound_model_is_narrowed(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    """Otherwise every refusal here could have another reason."""
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW, "--json"))
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["sizes"]["intermediate_size"] == [88, 40]


def test_planning_refuses_what_shrinking_would(dotexport: Command, model: Path) -> None:
    configured(quantization_config={})(model)
    refused(dotexport("plan", model, "--params", "0.7x"), 5, "already quantised")


def test_a_value_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    writer = checkpoint.CheckpointWriter(
        tmp_path, {"w": checkpoint.TensorSpec((2,), torch.float16)}
    )
    with pytest.raises(CheckpointError, match="convert the model to bfloat16"):
        writer.write("w", torch.tensor([1.0, 70_000.0]))


@pytest.mark.parametrize("verb", ["shrink", "plan"])
def test_a_hub_id_without_network_is_refused(
    dotexport: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = shrinking_of("nobody/no-such-model", text, tmp_path / "out", *NARROW)
    outcome = dotexport(*(arguments if verb == "shrink" else ["plan", arguments[1], *NARROW]))
    refused(outcome, 1, "nobody/no-such-model", "spelling and the network", "a local folder")


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such/folder", "a b/c"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(
    dotexport: Command, text: Path, tmp_path: Path, name: str
) -> None:
    outcome = dotexport(*shrinking_of(name, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, f"{name} is neither a folder nor a hub id", "expected a folder with")


# Text that cannot serve -------------------------------------------------------------------------


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


# Requests that cannot be met --------------------------------------------------------------------


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
        ([*NARROW, "--heal", "soon"], 2, ["--heal 'soon'", "local+200"]),
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
        ([*NARROW, "--device", "tpu"], 2, ["--device tpu", "expected auto, cpu or cuda"]),
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


# Outputs ----------------------------------------------------------------------------------------


def test_content_is_refused_and_only_our_own_may_be_replaced(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    written(out / "letter.txt", "dear")
    run = shrinking_of(model, text, out, *NARROW)
    refused(dotexport(*run), 2, "not empty", "--overwrite")
    refused(dotexport(*run, "--overwrite"), 2, "was not written by dotexport")
    assert names(out) == ["letter.txt"]
    (out / "letter.txt").unlink()
    assert dotexport(*run).code == 0
    refused(dotexport(*run), 2, "not empty", "--overwrite")
    assert dotexport(*run, "--overwrite").code == 0
    assert names(tmp_path) == ["model", "out", "text.txt"]


def test_an_output_that_cannot_be_made_is_refused(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    for out, word in [
        (text, "is a file"),
        (text / "below", "cannot be made"),
        (tmp_path / ("x" * 300), "cannot be made"),
        (Path("/proc/out"), "parent is a writable folder"),
    ]:
        refused(dotexport(*shrinking_of(model, text, out, *NARROW)), 2, out.name, word)
    assert names(tmp_path) == ["model", "text.txt"]


def test_a_parent_without_permission_is_refused(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(path: Path, *rest: object, **others: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW))
    refused(outcome, 2, "Permission denied", "whose parent is a writable folder")


def test_what_came_there_while_a_run_worked_is_kept(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def meanwhile(*_: object) -> None:
        out.mkdir()
        written(out / "letter.txt", "dear")

    monkeypatch.setattr(shrinking, "_copy_companions", meanwhile)
    refused(dotexport(*shrinking_of(model, text, out, *NARROW)), 2, "not empty", "another name")
    assert names(out) == ["letter.txt"]
    assert names(tmp_path) == ["model", "out", "text.txt"]


def test_a_model_is_not_replaced_by_what_comes_out_of_it(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    outcome = dotexport(*shrinking_of(out, text, out, "--intermediate", 32, "--overwrite"))
    refused(outcome, 2, "lies inside the output", "another output folder")
    assert (out / "hf" / "model.safetensors").is_file()


# A disk that is full ----------------------------------------------------------------------------


def disk_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (os, "posix_fallocate"),  # the weights: before an hour of work, not after it
        (checkpoint.CheckpointWriter, "write"),
        (os, "fsync"),
        (shutil, "copyfile"),
        (manifest, "write_json"),
    ],
)
def test_a_full_disk_is_named_and_nothing_stays(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
) -> None:
    monkeypatch.setattr(module, name, disk_full)
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, "is full", "GB are free now", "another disk")
    assert names(tmp_path) == ["model", "text.txt"]


def test_weights_are_reserved_before_any_work(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", disk_full)
    monkeypatch.setattr(
        "dotexport.narrowing.run.Narrowing.run", lambda *_: pytest.fail("worked first")
    )
    refused(dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW)), 1, "is full")


def test_what_the_system_refuses_is_told_without_a_traceback(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    monkeypatch.setattr(checkpoint.CheckpointWriter, "write", failing)
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, "Input/output error: model.safetensors")
    assert names(tmp_path) == ["model", "text.txt"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_ran_out_is_named(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def failing(_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("dotexport.narrowing.run.Narrowing.run", failing)
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, "memory ran out", "fewer --samples")
    assert names(tmp_path) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(OSError(errno.ENOSPC, "full"), 1, "is full"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_an_artifact_that_was_not_finished_is_not_there(
    dotexport: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    word: str,
) -> None:
    def half(self: object, source: checkpoint.Checkpoint, folder: Path, precision: str) -> NoReturn:
        (folder / "half").touch()
        raise error

    monkeypatch.setitem(BUILT_IN, "copy", f"{__name__}:Copy")
    monkeypatch.setattr(Copy, "write", half)
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    before = names(out), manifest.read(out)
    refused(dotexport("export", out, "--target", "copy"), code, word)
    assert (names(out), manifest.read(out)) == before


# Signals ----------------------------------------------------------------------------------------

# Runs until one step is reached, says so, and waits there to be stopped.
STALLED = """
import sys, time
from pathlib import Path
from pkgutil import resolve_name
from dotexport.app import cli
owner, name, marker, *sys.argv[1:] = sys.argv[1:]
def stall(*_, **__):
    Path(marker).touch()
    time.sleep(120)
setattr(resolve_name(owner), name, stall)
cli.main()
"""
HALFWAY = ("dotexport.narrowing.run:Narrowing", "_finish")  # most weights are written by then


def stopped(
    step: tuple[str, str], number: signal.Signals, marker: Path, run: list[object]
) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal when it reaches a step."""
    command = [sys.executable, "-c", STALLED, *step, str(marker), *map(str, run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 100
            while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(number)
            return process.wait(30), process.communicate()[1]
        finally:
            process.kill()
            marker.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    code, err = stopped(HALFWAY, number, tmp_path / "there", run)
    assert code == 130, err
    assert "interrupted: nothing unfinished was kept" in err
    assert "Traceback" not in err
    assert names(tmp_path) == ["model", "text.txt"]


def test_a_killed_run_leaves_only_what_the_next_one_clears(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    stopped(HALFWAY, signal.SIGKILL, tmp_path / "there", run)
    assert ".out.lock" in names(tmp_path)  # which nobody holds
    (partial,) = set(names(tmp_path)) - {"model", "text.txt", ".out.lock"}
    assert partial.startswith(".out.partial-")
    assert not manifest.is_output(tmp_path / partial)
    assert dotexport(*run).code == 0
    assert names(tmp_path) == ["model", "out", "text.txt"]


# Recipes ----------------------------------------------------------------------------------------


def recipe(file: Path, model: Path, text: Path, **steps: Any) -> Path:
    step = {"calib": str(text), "samples": 2, "seqlen": 32, "intermediate": 40}
    content = {"model": str(model), "shrink": step} | steps
    return written(file, yaml.safe_dump(content))


def ended(module: object, name: str) -> Callable[..., None]:
    """A step that ends the run; `_record` knows hf by then, and the copy stays unlisted."""
    step: Callable[..., None] = getattr(module, name)

    def end(*arguments: Any, **options: Any) -> None:
        if name == "_record" and arguments[1].target == "hf":
            return step(*arguments, **options)
        raise KeyboardInterrupt

    return end


@pytest.mark.parametrize(
    ("module", "name"),
    [(pipeline, "_export"), (exporting, "_record"), (pipeline, "evaluate_into")],
)
def test_a_recipe_goes_on_with_the_first_missing_step(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{__name__}:Copy")
    out = tmp_path / "out"
    quality = {"text": str(text), "samples": 2, "seqlen": 32}
    file = recipe(tmp_path / "r.yaml", model, text, export=["copy"], eval=quality)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, ended(module, name))
        assert dotexport("run", file, "-o", out).code == 130
    assert "quality" not in manifest.read(out)
    weights = (out / "hf" / "model.safetensors").stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinking, "prepare", lambda *_: pytest.fail("narrowed again"))
        outcome = dotexport("run", file, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    made = json.loads(outcome.out)
    assert made["quality"]["num_windows"] == 2
    assert made["artifacts"]["copy-plain"]["parity"]["passed"]
    assert (out / "hf" / "model.safetensors").stat() == weights


def test_a_recipe_goes_on_after_it_was_killed(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quality = {"text": str(text), "samples": 2, "seqlen": 32}
    run = ["run", recipe(tmp_path / "r.yaml", model, text, eval=quality), "-o", out]
    stopped(("dotexport.app.pipeline", "evaluate_into"), signal.SIGKILL, tmp_path / "there", run)
    assert manifest.read(out)["artifacts"]["hf"]["parity"]["passed"]
    monkeypatch.setattr(shrinking, "prepare", lambda *_: pytest.fail("narrowed again"))
    assert dotexport(*run).code == 0
    assert manifest.read(out)["quality"]["num_windows"] == 2
    assert names(tmp_path) == ["model", "out", "r.yaml", "text.txt"]


def test_another_recipe_is_refused_over_an_output(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport("run", recipe(tmp_path / "a.yaml", model, text), "-o", out).code == 0
    quality = {"text": str(text), "seqlen": 32, "samples": 2}
    other = recipe(tmp_path / "b.yaml", model, text, eval=quality)
    outcome = dotexport("run", other, "-o", out)
    refused(outcome, 2, "made by another recipe", "another output folder, or --overwrite")
    assert dotexport("run", other, "-o", out, "--overwrite").code == 0
    assert "quality" in manifest.read(out)


def test_the_recipe_a_shrink_prints_is_the_one_it_records(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    printed = dotexport(*run, "--print-recipe")
    assert dotexport(*run).code == 0
    assert (tmp_path / "out" / "recipe.yaml").read_text() == printed.out


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ({"export": ["nope"]}, 2, ["no target is called 'nope'", "hf"]),
        ({"export": ["hf:int3"]}, 2, ["cannot write 'int3'"]),
        ({"bench": [{"target": "nope"}]}, 2, ["no target is called 'nope'"]),
        ({"bench": [{"target": "hf", "batch": 0}]}, 2, ["batch_size is 0", "at least 1"]),
        ({"bench": [{"target": "hf"}, {"target": "hf"}]}, 2, ["two bench steps measure hf"]),
        ({"eval": {"text": "/no/such.txt"}}, 1, ["/no/such.txt does not exist"]),
        ({"eval": {"text": "embedded:evaluation", "seqlen": 999}}, 2, ["context of 512"]),
        ({"bench": [{"target": "hf", "rounds": 1 << 70}]}, 2, ["rounds is", "at most"]),
        (
            {"export": ["ort-cpu"], "shrink": {"calib": "embedded:calibration", "heal": "soon"}},
            2,
            [],
        ),
        ({"export": ["gguf:int4-k"]}, 5, ["cannot be exported", "gguf:int4-k", "rows of 256"]),
        ({"unknown": 1}, 2, ["unknown key 'unknown'", "known: model, shrink"]),
        ({"shrink": {"params": "0.7x"}}, 2, ["lacks the key 'calib'"]),
    ],
)
def test_a_recipe_is_refused_before_anything_is_narrowed(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    steps: dict[str, Any],
    code: int,
    words: list[str],
) -> None:
    file = recipe(tmp_path / "r.yaml", model, text, **steps)
    refused(dotexport("run", file, "-o", tmp_path / "out"), code, *words)
    assert names(tmp_path) == ["model", "r.yaml", "text.txt"]


# Verbs on what is no output ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "code", "words"),
    [
        (["verify", "{}"], 1, ["is not an output of dotexport", "shrink -o"]),
        (
            ["eval", "{}", "--baseline", "{}", "--text", "embedded:evaluation"],
            1,
            ["is not an output of dotexport", "shrink -o"],
        ),
        (["export", "{}", "--target", "hf"], 2, ["plain model folder", "-o"]),
        (["export", "{}", "--target", "nope"], 2, ["no target is called 'nope'", "hf"]),
        (["bench", "{}", "--target", "nope", "--noise-check"], 2, ["no target is called 'nope'"]),
    ],
)
def test_a_plain_folder_is_no_output(
    dotexport: Command, model: Path, tmp_path: Path, verb: list[str], code: int, words: list[str]
) -> None:
    before = names(model)
    refused(dotexport(*(part.format(model) for part in verb)), code, *words)
    assert names(model) == before
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("verb", "code", "message"),
    [
        (["verify"], 1, "none is not an output of dotexport"),
        (
            ["eval", "--baseline", "embedded", "--text", "embedded:evaluation"],
            1,
            "none is not an output of dotexport",
        ),
        (["export", "--target", "hf"], 1, "none is not a model folder"),
        (["bench", "--noise-check", "--target", "hf"], 2, "none is no folder; expected"),
    ],
)
def test_a_folder_that_does_not_exist_is_refused(
    dotexport: Command, tmp_path: Path, verb: list[str], code: int, message: str
) -> None:
    refused(dotexport(verb[0], tmp_path / "none", *verb[1:]), code, message)
    assert names(tmp_path) == []


def test_a_damaged_manifest_is_named(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    written(out / manifest.MANIFEST, "{")
    refused(dotexport("verify", out), 1, "dotexport.json is not valid JSON")


def test_an_export_can_be_asked_of_the_checkpoint_inside(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    outcome = dotexport("export", out / "hf", "--target", "hf", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["hf"]["parity"]["passed"]
    assert "README.md" not in names(out / "hf")


# What nobody foresaw ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("hidden"), RecursionError("deep"), ValueError()])
def test_what_nobody_foresaw_is_one_sentence_and_a_file(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def failing(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(checkpoint.CheckpointWriter, "write", failing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *NARROW))
    refused(outcome, 1, f"error: {type(error).__name__}", "report it with that file")
    assert outcome.err.strip().splitlines()[-1].startswith("error: ")
    (saved,) = tmp_path.glob("dotexport-traceback-*.txt")
    assert f"The traceback is in {saved}:" in outcome.err
    assert "in failing\n    raise error" in saved.read_text()
    assert names(tmp_path) == [saved.name, "model", "text.txt"]


def test_a_traceback_that_cannot_be_saved_is_still_one_sentence(
    dotexport: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> NoReturn:
        raise KeyError("hidden")

    monkeypatch.setattr(checkpoint, "settled", failing)
    monkeypatch.setattr(tempfile, "mkstemp", disk_full)
    refused(dotexport("plan", model, *NARROW), 1, "KeyError: 'hidden'", "No space left")


def test_a_name_that_no_text_can_hold_is_told(dotexport: Command, tmp_path: Path) -> None:
    refused(dotexport("plan", tmp_path / "caf\udce9", *NARROW), 1, "is neither a folder nor a hub")


SHAPES: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "a text": "x",
    "a number": 7,
    "a deep list": [[[[{}]]]],
    "an object": {"x": {"y": []}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "section",
    [
        *("artifacts", "source", "sizes", "shrink", "calibration", "quality", "bench", "served"),
        *("environment", "healing", "latency", "recipe", "architecture", "kind"),
    ],
)
def test_a_manifest_of_any_shape_is_read_or_refused(
    dotexport: Command, shrunk: Path, section: str, shape: str
) -> None:
    file = shrunk / manifest.MANIFEST
    written(file, json.dumps(json.loads(file.read_text()) | {section: SHAPES[shape]}))
    for verb in (["report", shrunk], ["verify", shrunk, "--target", "nope"]):
        outcome = dotexport(*verb)
        assert outcome.code in (0, 1, 2), outcome
        assert "did not expect" not in outcome.err


@pytest.fixture
def shrunk(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "shrunk")


@pytest.fixture(scope="module")
def whole(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that was narrowed and verified."""
    folder = tmp_path_factory.mktemp("whole")
    text = written(folder / "text.txt", "w1 w2 w3 w4 " * 100)
    step = build(ShrinkStep, calib=str(text), samples=2, seqlen=32, intermediate=40)
    shrinking.shrink(tiny_llama("wide-heads"), folder / "out", step.options())
    exporting.export(folder / "out", ["hf"])
    return folder / "out"


def test_a_damaged_report_of_verification_is_started_again(
    dotexport: Command, shrunk: Path
) -> None:
    for content in ("{", "[]", '{"artifacts": 7}', "[" * 9999):
        written(shrunk / "reports" / "verify.json", content)
        assert dotexport("verify", shrunk).code == 0
        told = json.loads((shrunk / "reports" / "verify.json").read_text())
        assert told["artifacts"]["hf"]["passed"]


# Files of users ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("before", [False, True])
def test_of_an_export_that_fails_nothing_stays_and_what_was_there_does(
    dotexport: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    before: bool,
) -> None:
    def broken(*_: object) -> NoReturn:
        raise error

    monkeypatch.setitem(BUILT_IN, "copy", f"{__name__}:Copy")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "model"))
    out = tmp_path / "out"
    if before:
        assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    told = manifest.read(out) if before else None
    monkeypatch.setattr(Copy, "write", broken)
    outcome = dotexport("export", model, "--target", "copy", "-o", out, "--overwrite")
    assert outcome.code in (1, 130)
    assert names(tmp_path) == (["model", "out"] if before else ["model"])
    assert not before or manifest.read(out) == told


def test_a_second_target_is_added_by_naming_the_output(
    dotexport: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{__name__}:Copy")
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    outcome = dotexport("export", model, "--target", "copy", "-o", out)
    refused(outcome, 2, "an output of dotexport already", f"`dotexport export {out} --target ...`")
    assert "--overwrite" not in outcome.err
    assert dotexport("export", out, "--target", "copy").code == 0
    assert set(manifest.read(out)["artifacts"]) == {"hf", "copy-plain"}


def test_a_folder_of_the_user_with_the_name_of_an_artifact_is_kept(
    dotexport: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILT_IN, "copy", f"{__name__}:Copy")
    out = tmp_path / "out"
    assert dotexport("export", model, "--target", "hf", "-o", out).code == 0
    (out / "copy-plain").mkdir()
    written(out / "copy-plain" / "letter.txt", "dear")
    refused(dotexport("export", out, "--target", "copy"), 2, "exists and is not empty")
    outcome = dotexport("export", out, "--target", "copy", "--overwrite")
    refused(outcome, 2, "holds what dotexport did not write: letter.txt")
    assert names(out / "copy-plain") == ["letter.txt"]


def in_shards(model: Path, *shards: str) -> None:
    """The tensors dealt out to files of these names, and an index of them."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {shard: {} for shard in shards}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[shards[number % len(shards)]][name] = tensor
    for shard, part in parts.items():
        (model / shard).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, model / shard, metadata={"format": "pt"})
    places = {name: shard for shard, part in parts.items() for name in part}
    written(model / checkpoint.INDEX, json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "shards", [("a.safetensors", "b b.safetensors"), ("x/w.safetensors", "y/w.safetensors")]
)
def test_shards_of_odd_names_are_exported_whole(
    dotexport: Command, model: Path, tmp_path: Path, shards: tuple[str, ...]
) -> None:
    in_shards(model, *shards)
    out = tmp_path / "out"
    outcome = dotexport("export", model, "--target", "hf", "-o", out)
    assert outcome.code == 0, outcome.err
    assert set(shards) < set(manifest.read(out)["artifacts"]["hf"]["files"])
    assert manifest.read(out)["artifacts"]["hf"]["parity"]["passed"]


@pytest.mark.parametrize("verb", ["export", "shrink"])
@pytest.mark.parametrize("shard", ["../w.safetensors", "{}/w.safetensors", "a/../../w.safetensors"])
def test_shards_outside_of_the_model_are_refused(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, shard: str, verb: str
) -> None:
    (model / "a").mkdir()
    in_shards(model, shard.format(tmp_path))
    run = (
        ["export", model, "--target", "hf", "-o", tmp_path / "out"]
        if verb == "export"
        else shrinking_of(model, text, tmp_path / "out", *NARROW)
    )
    refused(dotexport(*run), 1, "w.safetensors' is no file of this folder", "download it again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["export", "shrink"])
def test_a_companion_that_is_a_link_out_of_the_model_is_refused_at_once(
    dotexport: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path / "secret", "mine")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(shrinking, "prepare", lambda *_: pytest.fail("worked first"))
    run = (
        ["export", model, "--target", "hf", "-o", tmp_path / "out"]
        if verb == "export"
        else shrinking_of(model, text, tmp_path / "out", *NARROW)
    )
    refused(dotexport(*run), 1, "LICENSE is a link to", "outside of the model", "put a copy")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_the_models_own(
    dotexport: Command, model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    outcome = dotexport("export", snapshot, "--target", "hf", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out/hf/tokenizer.json").is_file()
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_two_runs_into_one_output_do_not_meet(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    marker = tmp_path / "there"
    command = [sys.executable, "-c", STALLED, *HALFWAY, str(marker), *map(str, run)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        try:
            while not marker.exists():
                assert first.poll() is None
                time.sleep(0.02)
            for second in (run, [*run, "--overwrite"]):
                refused(dotexport(*second), 2, "another run is writing", "wait until it has ended")
            assert first.poll() is None
        finally:
            first.kill()
    marker.unlink()
    assert dotexport(*run).code == 0
    assert names(tmp_path) == ["model", "out", "text.txt"]
