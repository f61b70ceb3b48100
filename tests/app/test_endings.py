"""What nobody foresaw is one sentence, and a file to report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors import SafetensorError

from dotexport.models import checkpoint

from .conftest import NARROW, Command, disk_full, names, refused, shrinking_of


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
    asked = (*NARROW, "--other", "none")
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *asked))
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


def test_a_full_disk_that_a_library_in_rust_met_is_told(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> NoReturn:
        raise SafetensorError("Error while serializing: I/O error: too large (os error 27)")

    monkeypatch.setattr(checkpoint.CheckpointWriter, "write", failing)
    asked = (*NARROW, "--other", "none")
    outcome = dotexport(*shrinking_of(model, text, tmp_path / "out", *asked))
    refused(outcome, 1, "error: File too large: the system refused")
    assert names(tmp_path) == ["model", "text.txt"]
