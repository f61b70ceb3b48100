"""The command line in this process, a model to break, and what outcomes are held to.

Everything in this folder goes through the command line. A message names the thing, says what was
expected and what to do.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from dotexport.app import cli, shrinking
from dotexport.app.steps import ShrinkStep
from dotexport.exports import exporting
from dotexport.options import build
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


def disk_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


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
            deadline = time.monotonic() + 300
            while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(number)
            return process.wait(30), process.communicate()[1]
        finally:
            process.kill()
            marker.unlink()


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
