"""One layer made of two: exact where it must be, and as its words say elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from dotexport.bench.tables.pairs import (
    DROPPED,
    NARROWED,
    WAYS,
    Judge,
    _groups,
    _made,
    _opened,
    pairs,
)
from dotexport.bench.tables.side_by_side import Merger, Side, Way, leaning
from dotexport.errors import UsageError
from dotexport.merging.refit import Moments, ridge_solve
from dotexport.narrowing.depth import Stack

CONTEXT: Any = SimpleNamespace(params={"windows": 4})
Tiny = Callable[..., Path]
FOUR = {"model_type": "llama", "num_hidden_layers": 4}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + n * n % 87) for n in range(4000)))
    return str(file)


def opened(model: Path, text: str) -> tuple[Stack, Judge]:
    return _opened(model, text, {"": text}, 16, 4, 32)


def silent(model: Path, layer: int, folder: Path) -> Path:
    """A copy in which one layer writes nothing."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.startswith(f"model.layers.{layer}.") and ("o_proj" in name or "down" in name):
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", NARROWED)
@pytest.mark.parametrize("repaired", [False, True])
def test_a_layer_that_adds_nothing_merges_into_the_one_before_it_exactly(
    way: str, repaired: bool, tiny_model: Tiny, text: str, tmp_path: Path
) -> None:
    """Which of the units say something is found, and the writer behind them is what it was."""
    stack, judge = opened(silent(tiny_model(**FOUR), 2, tmp_path / "silent"), text)
    row = judge.row(*_made(stack, _groups({2}, 4), WAYS[way], repaired=repaired))
    # Sums over tokens are in float64, streams in float32.
    assert row["KL"] < 1e-6


@pytest.mark.parametrize("way", NARROWED)
def test_a_layer_that_says_something_does_not(way: str, tiny_model: Tiny, text: str) -> None:
    """The counterpart: without it the test above could pass by doing nothing."""
    stack, judge = opened(tiny_model(**FOUR), text)
    row = judge.row(*_made(stack, _groups({2}, 4), WAYS[way], repaired=False))
    assert row["KL"] > 1e-3


def test_side_by_side_both_read_what_is_in_front_of_the_first(tiny_model: Tiny, text: str) -> None:
    stack, _ = opened(tiny_model(**FOUR), text)
    found_NLD = Merger(stack).behind([1, 2], stack.streams[1], WAYS["side by side"])
    wanted_NLD = stack.streams[1]
    layers = [stack.original.layer(number) for number in (1, 2)]
    for sublayer in stack.original.family.sublayers:
        added = [layer.after(sublayer, wanted_NLD) - wanted_NLD for layer in layers]
        wanted_NLD = wanted_NLD + added[0] + added[1]
    torch.testing.assert_close(found_NLD, wanted_NLD, rtol=1e-4, atol=1e-4)


def test_corrected_readers_see_more_of_what_they_saw(tiny_model: Tiny, text: str) -> None:
    stack, _ = opened(tiny_model(**FOUR), text)
    attention = stack.original.family.sublayers[0]
    second = stack.original.layer(2)
    sides = [
        Side(stack.original.layer(1), stack.streams[1]),
        Side(second, stack.streams[2]),
    ]
    some = slice(len(stack.fitted_NL))
    key = "self_attn.k_proj.weight"
    wanted_NLI = second.normalise(attention, stack.streams[2]) @ second.tensor(key).T
    off = {}
    for corrected in (False, True):
        wide = Merger(stack)._side_by_side(attention, sides, stack.streams[1], corrected=corrected)
        seen_NLI = wide.normalise(attention, stack.streams[1]) @ wide.tensor(key).T
        gap_NLI = seen_NLI[..., seen_NLI.shape[-1] // 2 :] - wanted_NLI
        off[corrected] = float(gap_NLI[some].square().sum())
    assert off[True] < 0.9 * off[False]


def test_neurons_of_both_answer_for_the_stream_better_than_those_of_one(
    tiny_model: Tiny, text: str
) -> None:
    stack, _ = opened(tiny_model(**FOUR), text)
    some = slice(len(stack.fitted_NL))

    def off(way: Way) -> float:
        gap_NLD = Merger(stack).behind([1, 2], stack.streams[1], way) - stack.streams[3]
        return float(gap_NLD[some].square().sum())

    one, repaired = Way(both=(), refit=False), WAYS[DROPPED]
    assert off(WAYS["MLPs alone, by OBS"]) < off(repaired) < off(one)


def test_least_squares_of_leaning_sums_are_those_of_the_ridge() -> None:
    moments = Moments.zeros(6, 3)
    generator = torch.Generator().manual_seed(0)
    moments.add(torch.randn(40, 6, generator=generator), torch.randn(40, 3, generator=generator))
    prior_OI: Tensor = torch.randn(3, 6, generator=generator).double()
    leant = leaning(moments, prior_OI, 0.1)
    found_OI = ridge_solve(leant, torch.zeros_like(prior_OI), 0.0)
    torch.testing.assert_close(found_OI, ridge_solve(moments, prior_OI, 0.1))


def test_blocks_are_made_of_what_stays_and_what_leaves_behind_it() -> None:
    assert _groups({2, 3, 5}, 7) == [(0,), (1, 2, 3), (4, 5), (6,)]


def test_the_table_says_all_ways_and_goes_on_where_it_was_stopped(
    tiny_model: Tiny, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"windows": 16, "judged": 4, "length": 32, "out": tmp_path / "out"}
    asked = {"pair": [1], "without": ["3,2"], "by": [DROPPED, "narrowed by OBS"]}
    monkeypatch.setattr("dotexport.bench.tables.pairs.save", _stopped)
    with pytest.raises(RuntimeError):
        pairs(CONTEXT, tiny_model(**FOUR), text, text, text, **asked, **sizes)
    monkeypatch.undo()
    monkeypatch.setattr("dotexport.bench.tables.pairs._made", _stopped)
    pairs(CONTEXT, tiny_model(**FOUR), text, text, text, **asked, **sizes)
    rows = json.loads((tmp_path / "out/pairs.json").read_text())["rows"]
    whole = rows.pop(0)
    assert (whole["way"], whole["KL"]) == ("the original", 0)
    assert whole["perplexity"] > 1
    many = [("without 3,2", way) for way in asked["by"]]
    one = [("1 and 2", way) for way in WAYS]
    assert [(row["layers"], row["way"]) for row in rows] == many + one
    assert all(row["KL"] == pytest.approx(row["other KL"]) for row in rows)
    assert not (tmp_path / "out/.pairs.jsonl").exists()


def _stopped(*args: Any, **named: Any) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"pair": [3]}, "pairs start with 0 to 2"),
        ({"without": ["0,1"]}, "layers 1 to 3 can leave"),
        ({"by": ["side by side"]}, "is none of"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    asked: dict[str, Any], said: str, tiny_model: Tiny, text: str, tmp_path: Path
) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        pairs(
            CONTEXT,
            tiny_model(**FOUR),
            text,
            text,
            text,
            windows=4,
            length=32,
            out=tmp_path,
            **asked,
        )


def test_a_class_with_norms_behind_its_matrices_is_refused(tiny_model: Tiny, text: str) -> None:
    with pytest.raises(UsageError, match="Qwen3ForCausalLM has norms"):
        opened(tiny_model(**FOUR | {"model_type": "qwen3"}), text)
