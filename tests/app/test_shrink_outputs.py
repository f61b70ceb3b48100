"""Where a narrowed model goes: folders, full disks, memory, signals, two runs at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from dotexport.app import shrinking
from dotexport.embedded import MODEL_DIR
from dotexport.models import checkpoint
from dotexport.outputs import summary
from dotexport.storage import manifest

from .conftest import (
    HALFWAY,
    NARROW,
    STALLED,
    Command,
    disk_full,
    names,
    refused,
    shrinking_of,
    stopped,
    written,
)


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


def settled(folder: Path) -> list[str]:
    """Names besides the place where the same command goes on."""
    return [name for name in names(folder) if not name.startswith(".out.unfinished-")]


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
    assert settled(tmp_path) == ["model", "out", "text.txt"]


def test_a_model_is_not_replaced_by_what_comes_out_of_it(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dotexport(*shrinking_of(model, text, out, *NARROW)).code == 0
    outcome = dotexport(*shrinking_of(out, text, out, "--intermediate", 32, "--overwrite"))
    refused(outcome, 2, "lies inside the output", "another output folder")
    assert (out / "hf" / "model.safetensors").is_file()


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
def test_a_full_disk_is_named_and_nothing_half_stays(
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
    assert settled(tmp_path) == ["model", "text.txt"]


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
    assert settled(tmp_path) == ["model", "text.txt"]


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
    assert settled(tmp_path) == ["model", "text.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_half(
    model: Path, text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    code, err = stopped(HALFWAY, number, tmp_path / "there", run)
    assert code == 130, err
    assert "interrupted: what was finished is kept in" in err
    assert "Traceback" not in err
    assert settled(tmp_path) == ["model", "text.txt"]


def test_a_killed_run_leaves_only_what_the_next_one_clears(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    run = shrinking_of(model, text, tmp_path / "out", *NARROW)
    stopped(HALFWAY, signal.SIGKILL, tmp_path / "there", run)
    assert ".out.lock" in names(tmp_path)  # which nobody holds
    (partial,) = set(settled(tmp_path)) - {"model", "text.txt", ".out.lock"}
    assert partial.startswith(".out.partial-")
    assert not manifest.is_output(tmp_path / partial)
    assert dotexport(*run).code == 0
    assert names(tmp_path) == ["model", "out", "text.txt"]


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


def test_the_end_says_what_it_cost_and_what_to_do_next(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = dotexport(*shrinking_of(model, text, out, *NARROW, "--samples", 4))
    assert outcome.code == 0, outcome.err
    cost = manifest.read(out)["held_out"]
    # On text of another kind, too: what the original samples itself, where nothing else is said.
    assert (out / "reports/second.jsonl").is_file()
    assert cost["other_kl"] == json.loads((out / "reports/shrink.json").read_text())["other_kl"]
    assert cost["other_kl"] != cost["kl"]
    assert f"{cost['other_perplexity_ratio']:.3f}x" in outcome.out
    told = json.loads((out / "reports/shrink.json").read_text())
    assert cost["kl"] == told["held_out_kl"]
    assert cost["perplexity_ratio"] == told["held_out_perplexity_ratio"]
    assert f"{cost['perplexity_ratio']:.3f}x" in outcome.out
    assert f"{max(cost['kl'], 0):.4f}" in outcome.out
    commands = [line[6:].split("  (")[0] for line in outcome.out.splitlines() if "next: " in line]
    assert commands == [
        f"dotexport verify {out}",
        f"dotexport eval {out} --baseline {model} --text FILE",
        f"dotexport export {out} --target ort-cpu:int4",
    ]
    verify, evaluate, _ = (command.split()[1:] for command in commands)
    assert dotexport(*verify).code == 0
    evaluate[-1] = str(text)
    assert dotexport(*evaluate, "--seqlen", 32).code == 0
    # What was done is not asked for again, and what was measured stands in the place of this.
    assert [command for _, command in summary.next_commands(out, str(model))] == commands[2:]
    assert "held-out calibration text" not in (out / "README.md").read_text()


def test_the_second_text_changes_what_is_chosen_and_can_be_left_out(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    hashes = {}
    for other in ("none", "self", str(text)):
        out = tmp_path / f"out-{Path(other).stem}"
        more = ("--samples", 5, "--other", other)
        outcome = dotexport(*shrinking_of(model, text, out, *NARROW, *more))
        assert outcome.code == 0, outcome.err
        assert ("sampling text" in outcome.err) == (other == "self")
        record = manifest.read(out)
        assert ("other_kl" in record["held_out"]) == (other == "self")
        # Half of the windows, the larger half of the calibration text.
        assert record["calibration"]["windows"] == (3 if other == "self" else 5)
        assert (record["calibration"].get("other") or {}).get("windows") == (
            2 if other == "self" else None
        )
        hashes[other] = manifest.sha256(out / "hf/model.safetensors")
    # A text that is calibrated on already is no second one.
    assert hashes["none"] == hashes[str(text)] != hashes["self"]


def test_a_model_without_text_is_calibrated_on_its_own(
    dotexport: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ("--samples", 3, "--seqlen", 32, "--heal", "none", "--intermediate", 96)
    asked += ("--other", "none")
    sampled = dotexport("shrink", MODEL_DIR, "-o", one, *asked)
    assert sampled.code == 0, sampled.err
    assert "sampling text from the original" in sampled.err
    file = one / "reports/self.jsonl"
    made = manifest.read(one)["calibration"]
    assert made["source"] == "self"
    assert made["own_text"]["file"] == "reports/self.jsonl"
    assert made["own_text"]["sha256"] == manifest.sha256(file)
    assert (
        dotexport("shrink", MODEL_DIR, "-o", two, "--calib", file, "--every", 1, *asked).code == 0
    )
    again = manifest.read(two)["calibration"]
    assert made["sha256"] == again["sha256"]
    assert [manifest.sha256(out / "hf/model.safetensors") for out in (one, two)] == [
        manifest.sha256(one / "hf/model.safetensors")
    ] * 2
    judged = ("--seqlen", 32, "--samples", 2)
    doubted = dotexport("eval", one, "--baseline", MODEL_DIR, "--text", file, *judged, "--json")
    assert "calibrated on text of the source it is judged on" in caplog.text
    assert json.loads(doubted.out)["one_source"] in caplog.text
    assert "To be doubted" in (one / "README.md").read_text()
    elsewhere = tmp_path / "elsewhere" / "text.txt"
    elsewhere.parent.mkdir()
    written(elsewhere, "import os\n" * 300)
    rival = ("--rival", one / "hf")
    refused = dotexport("eval", one, "--baseline", MODEL_DIR, "--text", elsewhere, *judged, *rival)
    assert (refused.code, "two models are called hf" in refused.err) == (2, True)
    rival = ("--rival", Path(shutil.copytree(MODEL_DIR, tmp_path / "sibling")))
    asked_of = ("--baseline", MODEL_DIR, "--text", elsewhere, *judged, "--json")
    clear = dotexport("eval", one, *asked_of, *rival)
    assert "one_source" not in json.loads(clear.out)
    # A text of another kind stands beside it; and it is not the one that was calibrated on.
    other = json.loads(clear.out)["other"]
    assert other["text"] == "self"
    assert (other["num_windows"], other["seqlen"]) == (2, 32)
    assert 0 < other["kl"] != json.loads(doubted.out)["kl"]
    # The original under another name is as good as itself, in every text and in what it says.
    for read in json.loads(clear.out)["bits_per_byte"]:
        assert read["models"]["sibling"] == pytest.approx(read["models"]["original"])
        assert read["models"]["hf"] != pytest.approx(read["models"]["original"])
    said = json.loads(clear.out)["generation"]["rows"]
    assert [row["agreement"]["1"] for row in said if row["model"] == "sibling"] == [1.0]
    assert "text that the original sampled itself" in (one / "README.md").read_text()
    assert (
        dotexport("shrink", MODEL_DIR, "-o", one, "--calib", "self", *asked, "--overwrite").code
        == 0
    )


def test_tokens_may_leave_by_text_of_the_models_own(dotexport: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--samples", 2, "--seqlen", 32, "--vocab", 700)
    assert dotexport("shrink", MODEL_DIR, "-o", out, "--calib", "self", *asked).code == 0
    assert list(manifest.read(out)["vocabulary"]["proof"]) == ["self", "other text"]
