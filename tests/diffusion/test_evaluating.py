"""What quality figures must say: nothing where nothing changed, and the loss that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dotexport.bench.tables import digits as bed
from dotexport.diffusion import pictures
from dotexport.diffusion.calibration import Calibration
from dotexport.diffusion.denoiser import Stored
from dotexport.diffusion.denoising import denoising_losses, draw
from dotexport.diffusion.evaluating import evaluate, read_latents
from dotexport.diffusion.layout import uniform
from dotexport.diffusion.pipeline_options import (
    LayoutOptions,
    PruneOptions,
    SampleOptions,
    TimestepWeights,
)
from dotexport.diffusion.pruning import prune
from dotexport.diffusion.sampling import Clock, component_of, load
from dotexport.diffusion.tables import find_sites
from dotexport.errors import CalibrationError, UsageError

Tiny = Callable[[str], Path]


def test_a_pipeline_beside_itself_differs_in_nothing(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    prompts.write_text("1\n3\n7\n", encoding="utf-8")
    options = SampleOptions(prompts=str(prompts), steps=2, guidance=1.0)
    grid = tmp_path / "reports" / "grid.png"
    found = evaluate(tiny("dit"), tiny("dit"), options, features="pixels", grid=grid, repeats=2)
    assert found.deviation == 0.0
    assert found.loss == found.dense_loss
    assert found.frechet == pytest.approx(0.0, abs=1e-6)
    image = Image.open(grid)
    assert image.width / image.height == pytest.approx(3 / 2)


@pytest.mark.parametrize("name", ["mmdit", "dit"])
def test_the_loss_is_the_one_that_was_trained(name: str, digits: Path) -> None:
    """Conditioning as the pipeline gives it, against the model called by hand."""
    pipe = load(digits / name)
    x, label = bed.pictures(held_out=True)
    x, label = x[:64], label[:64]
    prompts = label.tolist() if name == "dit" else [bed.WORDS[n] for n in label]
    options = SampleOptions(prompts="", batch=64, extra=bed.CALL if name == "mmdit" else {})
    (found,) = denoising_losses(pipe, [pipe.transformer], prompts, x, options, 4)
    rng, losses = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _ in range(4):
            noisy, time, wanted = draw(pipe.scheduler, x, rng)
            answer = by_hand(name, pipe, noisy, time, label)
            losses.append(float((answer - wanted).square().mean()))
    assert found == pytest.approx(np.mean(losses), rel=1e-4)
    assert found < 0.45  # it was trained


def by_hand(name: str, pipe: Any, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
    if name == "dit":
        answer: Tensor = pipe.transformer(noisy, timestep=time, class_labels=label).sample
        return answer
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(bed.WORDS), None, None, do_classifier_free_guidance=False, **bed.CALL
    )
    return pipe.transformer(
        hidden_states=noisy,
        timestep=time,
        encoder_hidden_states=embeds[label],
        pooled_projections=pooled[label],
    ).sample


@pytest.mark.parametrize("name", ["mmdit", "dit"])
def test_obs_beats_random_removal_on_the_trained_pipelines(name: str, digits: Path) -> None:
    losses = {}
    for method in ("obs", "random"):
        pipe = load(digits / name)
        model = getattr(pipe, component_of(pipe))
        loss = (bed.flow_loss if name == "mmdit" else bed.noise_loss)(pipe)
        before = bed.held_out(model, loss, repeats=2)
        options = SampleOptions(
            prompts="", steps=8, guidance=1.0, batch=20, extra=bed.CALL if name == "mmdit" else {}
        )
        calibration = Calibration(
            pipe=pipe,
            prompts=list(bed.WORDS if name == "mmdit" else range(10)) * 2,
            options=options,
            weights=TimestepWeights(),
        )
        sites = find_sites(model)
        kept = uniform(model, sites, LayoutOptions(heads="0.75x", ffn="0.75x"))
        prune(calibration, sites, kept, PruneOptions(method=method, packages=2), Stored())
        losses[method] = bed.held_out(model, loss, repeats=2) / before
    assert losses["obs"] < 1.12
    assert losses["obs"] < losses["random"] - 0.05


def test_steps_are_counted_by_the_scheduler_not_by_calls(digits: Path) -> None:
    """A second-order scheduler calls the model twice in a step."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    clock, seen = Clock(scheduler), []
    with clock.running():
        scheduler.set_timesteps(3)
        x = torch.zeros(1, 1, 2, 2)
        for timestep in scheduler.timesteps:
            seen.append(clock.now)
            x = scheduler.step(torch.zeros_like(x), timestep, x).prev_sample
    assert seen == [(1, 3), (2, 3), (2, 3), (3, 3), (3, 3)]
    assert "step" not in vars(scheduler)


def test_the_frechet_distance_of_normal_clouds_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(4000, 3)), 2 * rng.normal(size=(4000, 3)) + 1
    # |mean|^2 + sum (s - s')^2 = 3 + 3; sampling leaves a few per cent.
    assert pictures.frechet(one, two) == pytest.approx(6.0, rel=0.1)
    assert pictures.frechet(one, one) == pytest.approx(0.0, abs=1e-9)


def test_unknown_features_and_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MODULE:FUNCTION"):
        pictures.feature_space("inception")
    assert pictures.feature_space("torch:flatten")(torch.ones(2, 3)).shape == (6,)
    file = tmp_path / "x.safetensors"
    save_file({"latents": torch.zeros(2, 1, 8, 8)}, file)
    with pytest.raises(CalibrationError, match="2 latents for 3 prompts"):
        read_latents(file, 3)
    with pytest.raises(CalibrationError, match="cannot serve"):
        read_latents(tmp_path / "missing.safetensors", 3)
