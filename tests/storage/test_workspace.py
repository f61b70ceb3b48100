"""Work that was kept is the work that comes back, bit for bit, and to its own command alone; what
was only half kept is never taken, and nothing of another command is lost without a word."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dotexport.errors import UsageError
from dotexport.storage import manifest, workspace
from dotexport.storage.workspace import Workspace, settle_others

IDENTITY = {"options": {"steps": 3, "rate": 1e-4}, "windows": ["a", "b"]}
RECORD = {"step": 7, "best": 1 / 3, "error": 0.1 + 0.2, "curve": [{"step": 2, "kl": None}]}


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    return {
        "half": whole.to(torch.bfloat16),
        "double": whole.double() / 3,
        "turned and learnt": whole.clone().requires_grad_().T,  # not contiguous
        "number": torch.tensor(3.0),
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def mine(tmp_path: Path) -> Workspace:
    return Workspace.of(tmp_path / "out", IDENTITY)


def test_a_step_comes_back_bit_for_bit_and_the_last_one_counts(mine: Workspace) -> None:
    assert mine.load("step") is None
    assert mine.folder is not None
    assert not mine.folder.exists()  # nothing to keep leaves nothing
    mine.save("step", {"n": 1}, {"half": torch.zeros(1)})
    early = mine.load("step")
    mine.save("step", RECORD, tensors())
    mine.save("other", {})
    found = mine.load("step")
    assert found is not None
    assert found[0] == RECORD
    assert found[1].keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[1][name].dtype == tensor.dtype
        assert found[1][name].is_contiguous()
        assert torch.equal(found[1][name], tensor)
    assert early == ({"n": 1}, {"half": torch.zeros(1)})  # no view of the file of today
    assert mine.load("other") == ({}, {})


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = Workspace()
    nowhere.save("step", RECORD, tensors())
    assert nowhere.load("step") is None
    nowhere.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("owner", "step"), [(workspace, "save_file"), (os, "fsync"), (Path, "replace")]
)
def test_a_step_whose_writing_is_interrupted_leaves_the_one_before(
    mine: Workspace, owner: Any, step: str
) -> None:
    mine.save("step", {"n": 1})
    assert mine.folder is not None
    before = files(mine.folder)

    def end(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, end)
        with pytest.raises(KeyboardInterrupt):
            mine.save("step", {"n": 2}, tensors())
    assert files(mine.folder) == before


def test_a_disk_without_room_costs_what_is_kept_and_not_the_run(
    mine: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine.save("before", RECORD)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    for _ in range(3):
        mine.save("step", RECORD, tensors())
    assert [r.message for r in caplog.records if "cannot be kept" in r.message] == caplog.messages
    assert len(caplog.messages) == 1
    assert mine.load("before") == (RECORD, {})
    assert mine.load("step") is None


def _cut(content: bytes) -> bytes:
    return content[:-9]


def _flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def _said_otherwise(content: bytes) -> bytes:
    assert b"0.333" in content
    return content.replace(b"0.333", b"0.334", 1)


@pytest.mark.parametrize(
    "damage", [_cut, _flipped, _said_otherwise, lambda _: b"", lambda _: b"{}" * 40]
)
def test_what_is_damaged_is_not_taken_and_that_is_said(
    mine: Workspace, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    mine.save("step", RECORD, tensors())
    assert mine.folder is not None
    file = mine.folder / "step.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert mine.load("step") is None
    assert f"{file} is damaged or of other inputs" in caplog.text
    mine.save("step", RECORD, tensors())  # and it is in nobody's way
    assert mine.load("step") is not None


def test_a_step_of_other_inputs_is_not_taken(mine: Workspace, tmp_path: Path) -> None:
    mine.given({"windows": "a"})
    mine.save("step", RECORD)
    again, other, less = (Workspace.of(tmp_path / "out", IDENTITY) for _ in range(3))
    again.given({"windows": "a"})
    other.given({"windows": "b"})
    assert again.load("step") == (RECORD, {})
    assert other.load("step") is None
    assert less.load("step") is None
    again.given({"healing": "a"})
    assert again.load("step") is None


def test_the_same_command_has_one_place_and_any_other_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    same = [
        Workspace.of(path, dict(order))
        for path in (out, Path("out"), tmp_path / "none" / ".." / "out")
        for order in (IDENTITY.items(), reversed(IDENTITY.items()))
    ]
    assert len({one.folder for one in same}) == 1
    others = [
        Workspace.of(out, IDENTITY | {"options": {"steps": 3, "rate": 2e-4}}),
        Workspace.of(out, IDENTITY | {"windows": ["b", "a"]}),
        Workspace.of(tmp_path / "out2", IDENTITY),
    ]
    assert len({same[0].folder, *(one.folder for one in others)}) == 4


@pytest.fixture
def crowd(tmp_path: Path) -> dict[str, Path]:
    """Unfinished work: mine, of another command for the same output, and for another output."""
    names = {"mine": ("out", 1), "theirs": ("out", 2), "elsewhere": ("out.2", 1)}
    found = {key: Workspace.of(tmp_path / out, {"n": n}) for key, (out, n) in names.items()}
    for place in found.values():
        place.save("step", RECORD, tensors())
    return {key: place.folder for key, place in found.items() if place.folder}


def test_hours_of_another_command_are_refused_and_stay(
    crowd: dict[str, Path], tmp_path: Path
) -> None:
    before = manifest.hash_files(tmp_path)
    with pytest.raises(UsageError, match=f"^{crowd['theirs']} holds the unfinished .* --overwrite"):
        settle_others(tmp_path / "out", Workspace(crowd["mine"]), discard=False)
    assert manifest.hash_files(tmp_path) == before


def test_discarding_is_of_others_for_this_output_alone(
    crowd: dict[str, Path], tmp_path: Path
) -> None:
    mine = Workspace(crowd["mine"])
    settle_others(tmp_path / "out", mine, discard=True)
    assert {whose for whose, folder in crowd.items() if folder.exists()} == {"mine", "elsewhere"}
    settle_others(tmp_path / "out", mine, discard=False)  # nothing is in the way any more
    assert mine.load("step") is not None


def test_a_name_is_no_pattern_for_the_unfinished_work_of_others(tmp_path: Path) -> None:
    """`out[1]` as a pattern means `out1`, whose hours would be discarded."""
    mine, theirs = tmp_path / ".out[1].unfinished-a", tmp_path / ".out1.unfinished-b"
    mine.mkdir()
    theirs.mkdir()
    settle_others(tmp_path / "out[1]", Workspace(), discard=True)
    assert not mine.exists()
    assert theirs.exists()


def test_who_is_stopped_is_told_what_is_kept(
    mine: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt) as nothing, mine.told():
        raise KeyboardInterrupt
    assert str(nothing.value) == ""
    mine.save("step", RECORD, {"w": torch.zeros(500_000)})
    words = f"what was finished is kept in {mine.folder} (2.0 MB); run the same command again"
    with pytest.raises(KeyboardInterrupt) as stopped, mine.told():
        raise KeyboardInterrupt
    assert str(stopped.value).startswith(words)
    caplog.set_level(logging.WARNING)
    with pytest.raises(UsageError), mine.told():
        raise UsageError("no")
    assert words in caplog.text


def test_a_header_says_all_that_is_no_tensor(mine: Workspace) -> None:
    """safetensors and JSON, and nothing that runs when it is read."""
    mine.save("step", RECORD, tensors())
    assert mine.folder is not None
    content = (mine.folder / "step.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["record"]) == RECORD
    mine.remove()
    assert not mine.folder.exists()
