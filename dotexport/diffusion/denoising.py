"""The loss a denoiser was trained on, at latents, noises and times that are the same for all.

Shapes: B latents, in the shape that the denoiser reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.calibration import Progress
from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.diffusion.sampling import batches, component_of, replaced, sample
from dotexport.errors import UnsupportedModelError


def denoising_losses(
    pipe: Any,
    models: Sequence[nn.Module],
    prompts: Sequence[Any],
    latents: Tensor,
    options: SampleOptions,
    repeats: int,
    progress: Progress = lambda stage, done, total: None,
) -> list[float]:
    """Mean squared error of each model, without guidance, over `repeats` noises per latent.

    Raises:
        UnsupportedModelError: a scheduler whose noise is not known here.
    """
    rng = torch.Generator().manual_seed(options.seed + 1)
    totals, count = [0.0] * len(models), 0
    for first, some in batches(prompts, options.batch):
        call = conditioning(pipe, some, options)
        x = latents[first : first + len(some)]
        for _ in range(repeats):
            noisy, time_B, wanted = draw(pipe.scheduler, x, rng)
            for n, model in enumerate(models):
                totals[n] += len(x) * call.error(model, noisy, time_B, wanted)
            count += len(x)
        progress("denoising loss", first + len(some), len(prompts))
    return [total / count for total in totals]


@dataclass(frozen=True)
class Conditioning:
    """One recorded call of a denoiser, into which other latents and times are put.

    Attributes:
        scale: what the pipeline multiplies the scheduler's timesteps with (Flux: 1/1000).
    """

    kwargs: Mapping[str, Any]
    scale: float

    def error(self, model: nn.Module, noisy: Tensor, time_B: Tensor, wanted: Tensor) -> float:
        """Mean squared error; a learned variance behind the answer is left out."""
        kwargs = dict(self.kwargs)
        latent = next(name for name in ("hidden_states", "sample") if name in kwargs)
        kwargs[latent] = noisy
        kwargs["timestep"] = (time_B * self.scale).to(kwargs["timestep"].dtype)
        with torch.no_grad():
            made = model(**kwargs)
        answer = made[0] if isinstance(made, tuple) else made.sample
        if answer.ndim == 4:
            answer = answer[:, : wanted.shape[1]]
        return float((answer - wanted).square().mean())


def conditioning(pipe: Any, prompts: Sequence[Any], options: SampleOptions) -> Conditioning:
    """What the pipeline gives its denoiser for these prompts, without guidance."""
    model = getattr(pipe, component_of(pipe))
    forward, seen = model.forward, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(dict(inspect.signature(forward).bind(*args, **kwargs).arguments))
        return forward(*args, **kwargs)

    # A distilled guidance is an input like any other; the other kind doubles the batch.
    distilled = getattr(model.config, "guidance_embeds", False)
    plain = replace(options, steps=1, guidance=options.guidance if distilled else 1.0)
    with replaced(model, "forward", recording):
        sample(pipe, prompts, 0, plain)
    # A single step may be at time 0 (DDIM), which says nothing about the scale.
    first, given = (float(t.flatten()[0]) for t in (pipe.scheduler.timesteps, seen[0]["timestep"]))
    return Conditioning(seen[0], given / first if first else 1.0)


def draw(scheduler: Any, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their timesteps, and what the denoiser should answer.

    Raises:
        UnsupportedModelError: neither rectified flow nor a schedule of alphas.
    """
    noise = torch.randn(x.shape, generator=rng)
    steps = int(scheduler.config.num_train_timesteps)
    if type(scheduler).__name__.startswith("FlowMatch"):
        t_B = torch.rand(len(x), generator=rng)
        t = t_B.view(-1, *[1] * (x.ndim - 1))
        return (1 - t) * x + t * noise, steps * t_B, noise - x
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedModelError(
            f"the denoising loss under {type(scheduler).__name__} is not known; expected rectified "
            "flow (FlowMatch...) or a scheduler with alphas_cumprod (DDPM, DDIM, ...)"
        )
    t_B = torch.randint(0, steps, (len(x),), generator=rng)
    alpha = scheduler.alphas_cumprod[t_B].view(-1, *[1] * (x.ndim - 1)).float()
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    wanted = {
        "epsilon": noise,
        "sample": x,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * x,
    }
    return noisy, t_B, wanted[scheduler.config.prediction_type]
