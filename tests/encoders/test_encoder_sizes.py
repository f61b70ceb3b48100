"""Sizes that a budget leads a text encoder to, a narrower stream among them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from dotexport.encoders.encoder_folder import open_encoder
from dotexport.encoders.encoder_options import SizeOptions
from dotexport.encoders.encoder_shrinking import Tried, _about
from dotexport.encoders.encoder_sizes import Sizes, candidates, num_parameters, parameters_after
from dotexport.encoders.encoder_walk import Walked
from dotexport.errors import SizeError

from .command import run
from .conftest import BERT

Made = Callable[[Path, str], Path]


def test_a_budget_may_narrow_the_stream(
    sentence_transformer: Path, text: str, made: Made, tmp_path: Path
) -> None:
    """Where a head alone reads it; of embeddings, where that is asked for."""
    asked = ("--params", "0.8x")
    classifier = made(tmp_path / "classifier", "roberta")
    streams = {row["hidden_size"] for row in run("plan", classifier, *asked)["choices"]}
    assert streams == {24, 18, 12}
    planned = run("plan", sentence_transformer, *asked)
    assert {row["hidden_size"] for row in planned["choices"]} == {24}
    free = (*asked, "--axes", "hidden_size,intermediate_size")
    planned = run("plan", sentence_transformer, *free)
    assert {row["hidden_size"] for row in planned["choices"]} == {24, 18, 12}
    assert {row["num_hidden_layers"] for row in planned["choices"]} == {3}
    shrunk = run("shrink", sentence_transformer, "-o", tmp_path / "out", *free, "--calib", text)
    tried = [(row["hidden"], row["cosine"]) for row in shrunk["tried"]]
    assert {hidden for hidden, _ in tried} >= {24, 18}
    assert shrunk["cosine"][0] == max(cosine for _, cosine in tried)
    before, after = shrunk["sizes"]["parameters"]
    assert 0.7 * before < after <= 0.8 * before


def test_every_choice_meets_the_budget_as_well_as_it_can(made: Made, tmp_path: Path) -> None:
    encoder = open_encoder(made(tmp_path / "model", "modernbert-SequenceClassification"))
    whole = num_parameters(encoder.model)
    found = candidates(encoder, SizeOptions(params="0.7x"), total=whole)
    assert len({sizes.hidden for sizes in found}) > 1
    for sizes in found:
        assert parameters_after(encoder, sizes) <= 0.7 * whole
        more = Sizes(sizes.width + 8, sizes.depth, sizes.hidden)
        assert sizes.width == 64 or parameters_after(encoder, more) > 0.7 * whole


def test_a_narrower_stream_may_be_deeper(made: Made, tmp_path: Path) -> None:
    """Where the wider one had room for one layer, the best of the narrower is looked for."""
    asked: list[int] = []

    def tried(sizes: Sizes) -> Tried:
        asked.append(sizes.depth)
        return Tried(sizes, [], Walked(nn.Identity(), []), 1 - abs(sizes.depth - 4) / 10)

    group = [Sizes(64, depth, 18) for depth in range(6, 0, -1)]
    shallow = Tried(Sizes(64, 1, 24), [], Walked(nn.Identity(), []), 0.5)
    assert _about(shallow, group, tried).sizes.depth == 4
    assert asked == [1, 2, 3, 4, 5]
    asked.clear()
    deep = Tried(Sizes(64, 6, 24), [], Walked(nn.Identity(), []), 0.5)
    assert _about(deep, group, tried).sizes.depth == 4
    assert asked == [6, 5, 4, 3]


def test_an_axis_alone_leaves_the_others_as_they_are(made: Made, tmp_path: Path) -> None:
    """Also where an MLP is no multiple of what a budget leads to."""
    model = tmp_path / "odd"
    torch.manual_seed(0)
    words = {**BERT, "intermediate_size": 60, "num_labels": 3}
    config = transformers.BertConfig(**words)
    transformers.BertForSequenceClassification(config).save_pretrained(model)
    planned = run("plan", model, "--params", "0.9x", "--axes", "hidden_size")
    assert {row["intermediate_size"] for row in planned["choices"]} == {60}
    assert {row["num_hidden_layers"] for row in planned["choices"]} == {3}


@pytest.mark.parametrize("axes", [None, "hidden_size", "intermediate_size"])
def test_the_least_that_is_said_can_be_asked_for(
    axes: str | None, made: Made, tmp_path: Path
) -> None:
    model = made(tmp_path / "model", "roberta")
    named = ("--axes", axes) if axes else ()
    with pytest.raises(SizeError, match="the least is") as refused:
        run("plan", model, "--params", "0.02x", *named)
    [least] = re.findall(r"the least is ([\d,]+)", str(refused.value))
    assert run("plan", model, "--params", least.replace(",", ""), *named)["choices"]
