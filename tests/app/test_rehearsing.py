"""Sizes that are to be distilled are judged behind a short distillation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport.app.rehearsing import healed_rehearsals
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.generation.second_text import NONE
from dotexport.healing import heal_options
from dotexport.healing.heal_options import HealOptions
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.sizes.budget import plan
from dotexport.vocabulary.vocabulary_options import VocabularyOptions

from .conftest import Command, names

ASKED = ShrinkOptions(
    sizes=SizeOptions(params="0.8x", axes="intermediate_size,num_hidden_layers"),
    text=TextOptions(source="embedded:calibration", samples=8, seqlen=64),
    heal=HealOptions(steps=4, batch=4, every=2, precision="fp32"),
)


def test_the_last_few_sizes_are_judged_behind_a_short_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tokens that stay, where some leave."""
    monkeypatch.setattr(heal_options, "TRIAL_TOKENS", (64, 128))
    quick = NarrowOptions(local=LocalOptions(least_steps=1, passes=1e-9))
    asked = replace(ASKED, vocabulary=VocabularyOptions(vocab=3000), other=NONE, narrow=quick)
    shrunk = shrink(MODEL_DIR, tmp_path / "out", asked)
    report = json.loads((tmp_path / "out/reports/shrink.json").read_text())
    checked = report["allocation"]["checked"]
    assert len(checked) > 1
    taken = min(checked, key=lambda row: row["healed_kl"])
    assert shrunk.plan.sizes().items() <= taken.items()
    assert names(tmp_path / "out") == ["README.md", "dotexport.json", "hf", "reports"]


def test_steps_of_a_trial_are_steps_of_distillation(tmp_path: Path) -> None:
    """What was narrowed is nearer to the original behind them, on windows of both texts."""
    source = Checkpoint.open(MODEL_DIR)
    windows_NL = token_windows(MODEL_DIR, ASKED.text)
    decided = plan(source.config, SizeOptions(intermediate_size=96))  # far from it
    found = []
    rough = replace(ASKED, narrow=NarrowOptions(refit=False))
    for rate in (1e-12, 2e-4):
        trial = HealOptions(steps=6, batch=4, every=6, rate=rate, precision="fp32")
        both = CalibrationText(windows_NL[:6], windows_NL[6:])
        measure = healed_rehearsals(source, both, rough, trial, torch.device("cpu"), tmp_path)
        found.append(measure(decided))
    assert 0 < found[1] < 0.99 * found[0]
    assert names(tmp_path) == []


def test_a_trial_is_a_tenth_on_calibration_text_and_bounded() -> None:
    asked = HealOptions(tokens=300_000, text="self", rate=1e-3)
    trial = asked.trial(512)
    assert trial is not None
    steps = asked.settled(512)  # whole ones
    assert trial.tokens == steps.steps * steps.tokens_per_step // 10 == 30_105
    assert (trial.text, trial.rate) == (None, 1e-3)
    assert trial.settled(512).evaluations == {0, trial.settled(512).steps}
    most = replace(asked, tokens=1 << 34).trial(512)
    assert most is not None
    assert most.tokens == heal_options.TRIAL_TOKENS[1]
    assert replace(asked, tokens=9 * heal_options.TRIAL_TOKENS[0]).trial(512) is None
    by_steps = HealOptions(steps=100, batch=4).trial(512)
    assert by_steps is not None
    assert (by_steps.steps, by_steps.tokens) == (None, 100 * 4 * 512 // 10)


def test_plan_says_what_it_judges_by(dotexport: Command) -> None:
    def planned(*more: object) -> dict[str, Any]:
        outcome = dotexport("plan", MODEL_DIR, "--params", "0.7x", "--json", *more)
        assert outcome.code == 0, outcome.err
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    free, healed = planned(), planned("--heal", "1M")
    assert free["judged"] == "as they are without healing"
    assert healed["judged"] == "the last few behind a distillation on 65,536 tokens"
    assert healed["allocation_seconds"] > free["allocation_seconds"]
    shown = dotexport("plan", MODEL_DIR, "--params", "0.7x", "--heal", "1M").out
    assert "judged the last few behind a distillation on 65,536 tokens" in " ".join(shown.split())
