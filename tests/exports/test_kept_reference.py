"""What torch computes is computed once for the same files, and never taken for others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.exports import kept_reference
from dotexport.exports.exporting import export
from dotexport.exports.kept_reference import FILE, reference_of
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.verifying import verify
from dotexport.models.checkpoint import Checkpoint


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of torch; however fast it was, it is kept."""
    calls: list[dict[str, Any]] = []

    def counted(checkpoint: Checkpoint, **asked: Any) -> Reference:
        calls.append(asked)
        return compute_reference(checkpoint, **asked)

    monkeypatch.setattr(kept_reference, "compute_reference", counted)
    monkeypatch.setattr(kept_reference, "WORTH", 0.0)
    return calls


@pytest.fixture
def out(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama("wide-heads"), tmp_path / "out" / "hf")
    return tmp_path / "out"


def same(one: Any, two: Any) -> bool:
    """Every number of two references, bit by bit."""
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
    return bool(one == two)


def test_what_is_kept_is_what_was_computed(out: Path, computed: list[dict[str, Any]]) -> None:
    first, again = reference_of(out), reference_of(out)
    assert len(computed) == 1
    assert same(first, again)
    assert first.long is not None
    assert not same(first, reference_of(out, rounded=False))
    # Less than is kept is a part of it, and as if it had been computed alone.
    part = reference_of(out, rounded=False, precisions=())
    alone = compute_reference(Checkpoint.open(out / "hf"), rounded=False, precisions=())
    assert len(computed) == 1
    assert (part.rounded, part.long and part.long.rounded) == ((), None)
    assert same(part.logits, alone.logits)


def test_more_than_is_kept_is_computed_together_with_it(
    out: Path, computed: list[dict[str, Any]]
) -> None:
    reference_of(out, rounded=False, precisions=["fp16"])
    reference_of(out, rounded=True, precisions=["fp32"])
    assert computed[1] == {"rounded": True, "precisions": {"fp16", "fp32"}}
    reference_of(out, rounded=True, precisions=["fp16"])
    assert len(computed) == 2


@pytest.mark.parametrize("what", ["weights", "config", "code", "library", "damage"])
def test_it_is_not_taken_where_anything_has_changed(
    what: str, out: Path, computed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_of(out)
    if what == "weights":
        file = out / "hf/model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif what == "config":
        file = out / "hf/config.json"
        file.write_text(file.read_text() + "\n")
    elif what == "code":
        monkeypatch.setattr(kept_reference, "ROOMS", ("exports",))
    elif what == "library":
        monkeypatch.setattr(kept_reference, "version", lambda name: f"{name} 0")
    else:
        (out / FILE).write_bytes((out / FILE).read_bytes()[:-8])
    reference_of(out)
    assert len(computed) == 2


def test_verify_asks_torch_once_for_all_calls_and_not_at_all_where_that_is_quick(
    out: Path, computed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out / "hf", ["hf"], out=(made := out.parent / "made"))
    assert all(parity.passed for parity in verify(made))
    assert len(computed) == 1
    assert [f.name for f in (made / "reports").glob("*reference*")] == [FILE.name]
    monkeypatch.setattr(kept_reference, "WORTH", 60.0)
    (made / FILE).unlink()
    assert all(parity.passed for parity in verify(made))
    assert not (made / FILE).exists()


def test_what_cannot_be_kept_is_computed_and_said(
    out: Path,
    computed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_reference, "save_file", full)
    assert reference_of(out).logits
    assert "torch's logits are not kept for the next call" in caplog.text
    assert list((out / "reports").iterdir()) == []
