"""The test bed of diffusion: two small pipelines trained on scikit-learn's 8x8 digits.

    python -m dotexport.bench.tables.digits tests/diffusion/digits

trains them once more, in about 13 minutes of one core of an Intel Xeon.

`mmdit` is a StableDiffusion3Pipeline (rectified flow, one word as prompt, frozen random CLIPs, no
VAE: its latents are the pictures), `dit` a DiTPipeline (DDIM, class labels, an untrained VAE that
its class insists on). Both have 4 blocks of 4 heads of 16, patch 2.

Shapes: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TRAINED = 1400
NO_CLASS = 1000  # what DiTPipeline gives as the class of nothing
CALL = {"max_sequence_length": 1}
"""How the mmdit is called: without a T5, its pipeline pads with 256 zero tokens otherwise."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def pictures(*, held_out: bool) -> tuple[Tensor, Tensor]:
    """Digits as (B, 1, 8, 8) in -1 ... 1 and their labels; 1400 to train on, 397 held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    part = slice(NUM_TRAINED, None) if held_out else slice(NUM_TRAINED)
    scaled = images[part].astype(np.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return torch.from_numpy(scaled), torch.from_numpy(labels[part]).long()


def mmdit_pipeline(seed: int = 0) -> Any:
    """An untrained StableDiffusion3Pipeline for 8x8 pictures."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=None,
        text_encoder=_text_encoder(),
        tokenizer=word_tokenizer(),
        text_encoder_2=_text_encoder(),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def dit_pipeline(seed: int = 0) -> Any:
    """An untrained DiTPipeline for 8x8 pictures; its VAE is a stand-in."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        num_embeds_ada_norm=NO_CLASS,
    )
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(4,), norm_num_groups=1
    )
    scheduler = DDIMScheduler(clip_sample=False)
    labels = dict(enumerate(WORDS))
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler, id2label=labels)


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=3,
        bos_token_id=1,
        eos_token_id=12,
        pad_token_id=0,
    )
    encoder = CLIPTextModelWithProjection(config)
    for parameter in encoder.parameters():
        if parameter.ndim == 2:  # at the usual 0.02 all words would look alike
            nn.init.normal_(parameter, 0.0, 1.0 if len(parameter) == 13 else 0.3)
    return encoder


def word_tokenizer() -> Any:
    """One token per word of a digit, then the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *WORDS, "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 12)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=3,
    )


def flow_loss(pipe: Any) -> Loss:
    """|v(x_t, t) - (noise - x)|^2 at x_t = (1 - t) x + t noise, t uniform.

    One word in ten is left out while training.
    """
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            [*WORDS, ""], None, None, do_classifier_free_guidance=False, **CALL
        )

    def loss(model: nn.Module, x_BCHW: Tensor, label_B: Tensor, rng: torch.Generator) -> Tensor:
        noise_BCHW = torch.randn(x_BCHW.shape, generator=rng)
        t_B = torch.rand(len(x_BCHW), generator=rng)
        if model.training:
            label_B = label_B.masked_fill(torch.rand(len(label_B), generator=rng) < 0.1, 10)
        t_B111 = t_B[:, None, None, None]
        predicted = model(
            hidden_states=(1 - t_B111) * x_BCHW + t_B111 * noise_BCHW,
            timestep=1000 * t_B,
            encoder_hidden_states=embeds[label_B],
            pooled_projections=pooled[label_B],
        ).sample
        return nn.functional.mse_loss(predicted, noise_BCHW - x_BCHW)

    return loss


def noise_loss(pipe: Any) -> Loss:
    """|e(x_t, t) - noise|^2 at the scheduler's x_t, t uniform; the class drops out by itself."""

    def loss(model: nn.Module, x_BCHW: Tensor, label_B: Tensor, rng: torch.Generator) -> Tensor:
        noise_BCHW = torch.randn(x_BCHW.shape, generator=rng)
        t_B = torch.randint(0, 1000, (len(x_BCHW),), generator=rng)
        noisy_BCHW = pipe.scheduler.add_noise(x_BCHW, noise_BCHW, t_B)
        predicted = model(noisy_BCHW, timestep=t_B, class_labels=label_B).sample
        return nn.functional.mse_loss(predicted, noise_BCHW)

    return loss


def train(
    model: nn.Module, loss: Loss, *, steps: int, batch: int = 128, rate: float = 2e-3, seed: int = 0
) -> None:
    """AdamW, warm-up and cosine; the model ends as the moving average of its weights."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # adaLN-zero (Peebles and Xie 2022)
        if "norm" in name and "linear" in name:
            nn.init.zeros_(parameter)
    x_NCHW, label_N = pictures(held_out=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    for step in range(steps):
        share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = rate * share
        drawn = torch.randint(0, len(x_NCHW), (batch,), generator=rng)
        value = loss(model.train(), x_NCHW[drawn], label_N[drawn], rng)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        if step % 250 == 249:
            typer.echo(f"step {step + 1}: {held_out(average.module, loss):.4f} held out", err=True)
    model.load_state_dict(average.module.state_dict())
    model.eval()


@torch.no_grad()
def held_out(model: nn.Module, loss: Loss, *, repeats: int = 8) -> float:
    """Mean loss over the held-out digits, each at `repeats` fixed noises and times."""
    x_NCHW, label_N = pictures(held_out=True)
    rng = torch.Generator().manual_seed(1)
    values = [float(loss(model.eval(), x_NCHW, label_N, rng)) for _ in range(repeats)]
    return float(np.mean(values))


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Folder for mmdit/ and dit/.")],
    only: Annotated[str, typer.Option(help="mmdit or dit; default: both.")] = "",
    steps: Annotated[
        int | None, typer.Option(help="Steps of training; default: 3000 (mmdit), 700 (dit).")
    ] = None,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
) -> None:
    """Train both pipelines and save them with safetensors."""
    torch.set_num_threads(1)
    for name, build, loss, usual in (
        ("mmdit", mmdit_pipeline, flow_loss, 3000),
        ("dit", dit_pipeline, noise_loss, 700),
    ):
        if only in ("", name):
            pipe = build()
            train(pipe.transformer, loss(pipe), steps=steps or usual, rate=rate)
            pipe.save_pretrained(out / name)


if __name__ == "__main__":
    app()
