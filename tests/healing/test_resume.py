"""Work that was kept is the work that comes back, bit for bit, and to its own command alone; what
was only half kept is never taken, and nothing of another command is lost without a word."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dotexport.app.shrink_options import ShrinkOptions
from dotexport.axes.plan import SizeOptions
from dotexport.errors import CheckpointError, UsageError
from dotexport.healing import heal, resume
from dotexport.healing.heal import workspace_of
from dotexport.healing.heal_options import HealOptions
from dotexport.healing.healing_text import HealingText
from dotexport.healing.resume import ClosedForm, Workspace, settle_others
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.storage import manifest

IDENTITY = {"options": {"steps": 3, "rate": 1e-4}, "windows": ["a", "b"]}
OPTIONS = asdict(ShrinkOptions(sizes=SizeOptions(hidden_size=8), text=TextOptions(source="t")))


def closed_form() -> ClosedForm:
    random = torch.Generator().manual_seed(0)
    sites: list[dict[str, Any]] = [{"site": "mlp.0", "error": 0.1 + 0.2, "ridge": None}]
    E_DK = torch.randn(6, 4, generator=random, dtype=torch.float64)
    return ClosedForm(E_DK, {"kind": "learned", "energy": 1 / 3}, 0.1, 1.2, sites, "cpu", [0, 2])


def checkpoint(folder: Path, content: bytes = b"weights \x00\xff") -> Path:
    (folder / "below").mkdir(parents=True)
    for name in ("model.safetensors", "below/tokenizer.json"):
        (folder / name).write_bytes(content)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.of(tmp_path / "out", IDENTITY)


def interrupted(owner: Any, step: str, run: Callable[[], None]) -> None:
    """Run until a step is reached, and end there as Ctrl-C would."""

    def end(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, end)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_a_closed_form_comes_back_bit_for_bit_and_without_what_was_there_before(
    workspace: Workspace, tmp_path: Path
) -> None:
    kept, hf = closed_form(), checkpoint(tmp_path / "hf")
    assert workspace.closed_form(tmp_path / "none") is None
    workspace.keep_closed_form(kept, checkpoint(tmp_path / "old", b"old"))
    workspace.save({"w": torch.ones(2)}, {"step": 4})
    workspace.keep_closed_form(kept, hf)
    assert workspace.saved() is None
    found = workspace.closed_form(tmp_path / "again")
    assert found is not None
    assert found.E_DK.dtype == torch.float64
    assert torch.equal(found.E_DK, kept.E_DK)
    assert asdict(found) | {"E_DK": None} == asdict(kept) | {"E_DK": None}
    assert files(tmp_path / "again") == files(hf)


def test_a_state_comes_back_bit_for_bit_and_the_last_one_counts(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.keep_closed_form(closed_form(), checkpoint(tmp_path / "hf"))
    assert workspace.saved() is None
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 6, generator=random)
    tensors = {
        "half": whole.to(torch.bfloat16),
        "double": whole.double() / 3,
        "turned and learnt": whole.clone().requires_grad_().T,  # not contiguous
    }
    course = {"step": 7, "best": 1 / 3, "curve": [{"step": 2, "kl": 0.1}]}
    workspace.save({"half": torch.zeros(1)}, {"step": 1})
    early = workspace.saved()
    workspace.save(tensors, course)
    found = workspace.saved()
    assert found is not None
    assert found[1] == course
    assert found[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)
    assert early is not None
    assert torch.equal(early[0]["half"], torch.zeros(1))  # no view of the file of today


@pytest.mark.parametrize(
    ("owner", "step"), [(shutil, "copytree"), (resume, "save_file"), (resume, "write_json")]
)
def test_a_half_written_closed_form_is_not_taken(
    workspace: Workspace, tmp_path: Path, owner: Any, step: str
) -> None:
    hf = checkpoint(tmp_path / "hf")
    interrupted(owner, step, lambda: workspace.keep_closed_form(closed_form(), hf))
    assert workspace.closed_form(tmp_path / "again") is None
    assert not (tmp_path / "again").exists()
    workspace.keep_closed_form(closed_form(), hf)  # and it is in nobody's way
    assert workspace.closed_form(tmp_path / "again") is not None


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")])
def test_a_state_whose_writing_is_interrupted_leaves_the_one_before(
    workspace: Workspace, tmp_path: Path, owner: Any, step: str
) -> None:
    workspace.keep_closed_form(closed_form(), checkpoint(tmp_path / "hf"))
    workspace.save({"w": torch.ones(2)}, {"step": 4})
    before = files(workspace.folder)
    interrupted(owner, step, lambda: workspace.save({"w": torch.zeros(2)}, {"step": 6}))
    assert files(workspace.folder) == before


@pytest.mark.parametrize("name", ["closed/basis.safetensors", "closed/record.json"])
def test_a_damaged_closed_form_is_named_with_what_to_remove(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    workspace.keep_closed_form(closed_form(), checkpoint(tmp_path / "hf"))
    file = workspace.folder / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"^{file} .*remove {workspace.folder}.* to start"):
        workspace.closed_form(tmp_path / "again")


def test_the_same_command_finds_its_workspace_and_no_other_one_does(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = (Checkpoint.open(tiny_llama(name)) for name in ("wide-heads", "square"))
    train_NL, held_NL = torch.arange(24).reshape(3, 8), torch.arange(8).reshape(1, 8)
    text, out, cpu = HealingText(train_NL, held_NL), tmp_path / "out", torch.device("cpu")

    def place(**changes: Any) -> Path:
        asked = {"out": out, "source": source, "options": OPTIONS, "text": text, "device": cpu}
        return workspace_of(**{**asked, **changes}).folder

    mine = place()
    monkeypatch.chdir(tmp_path)
    assert mine == place(out=Path("out")) == place(out=tmp_path / "none" / ".." / "out")
    assert mine == place(options=dict(reversed(OPTIONS.items())))
    others = [
        place(source=other),
        place(options=OPTIONS | {"heal": asdict(HealOptions(steps=7))}),
        place(text=HealingText(train_NL.flip(0), held_NL)),
        place(text=HealingText(train_NL, held_NL + 1)),
        place(device=torch.device("cuda")),
        place(out=tmp_path / "out2"),
    ]
    monkeypatch.setattr(heal, "__version__", "0.0.0")
    assert len({mine, *others, place()}) == len(others) + 2


@pytest.fixture
def crowd(tmp_path: Path) -> dict[str, Path]:
    """Unfinished work: mine, of another command for the same output, and for another output."""
    names = {"mine": ("out", 1), "theirs": ("out", 2), "elsewhere": ("out.2", 1)}
    found = {key: Workspace.of(tmp_path / out, {"n": n}) for key, (out, n) in names.items()}
    for key, place in found.items():
        place.keep_closed_form(closed_form(), checkpoint(tmp_path / key))
    return {key: place.folder for key, place in found.items()}


def test_hours_of_another_command_are_refused_and_stay(
    crowd: dict[str, Path], tmp_path: Path
) -> None:
    before = manifest.hash_files(tmp_path)
    for keep in (Workspace(crowd["mine"]), None):
        named = crowd["theirs"] if keep else min(crowd["mine"], crowd["theirs"])
        with pytest.raises(UsageError, match=f"^{named} holds the unfinished .* pass --overwrite"):
            settle_others(tmp_path / "out", keep, overwrite=False)
    assert manifest.hash_files(tmp_path) == before


def test_overwriting_discards_what_is_of_others_for_this_output_alone(
    crowd: dict[str, Path], tmp_path: Path
) -> None:
    mine = Workspace(crowd["mine"])
    settle_others(tmp_path / "out", mine, overwrite=True)
    assert {whose for whose, folder in crowd.items() if folder.exists()} == {"mine", "elsewhere"}
    settle_others(tmp_path / "out", mine, overwrite=False)  # nothing is in the way any more
    assert mine.closed_form(tmp_path / "again") is not None


def test_a_name_is_no_pattern_for_the_unfinished_work_of_others(tmp_path: Path) -> None:
    """`out[1]` as a pattern means `out1`, whose hours would be discarded."""
    mine, theirs = tmp_path / ".out[1].healing-a", tmp_path / ".out1.healing-b"
    mine.mkdir()
    theirs.mkdir()
    settle_others(tmp_path / "out[1]", None, overwrite=True)
    assert not mine.exists()
    assert theirs.exists()


def test_the_record_of_another_release_is_refused_by_name(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.keep_closed_form(closed_form(), checkpoint(tmp_path / "hf"))
    record = workspace.folder / "closed" / "record.json"
    stored = json.loads(record.read_text())
    del stored["perplexity_ratio"]
    record.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"record\.json is not what is written there"):
        workspace.closed_form(tmp_path / "again")
