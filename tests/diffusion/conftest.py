"""Tiny diffusers pipelines, built from configs with random weights; the trained ones lie beside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport.storage.locking import locked

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def digits() -> Path:
    """The trained pipelines `mmdit` and `dit`; see dotexport/bench/digits.py."""
    return HERE / "digits"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in PIPELINES -> its folder, written once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "pipeline"
            torch.manual_seed(0)
            pipe = PIPELINES[name]()
            spread(pipe)
            pipe.save_pretrained(folders[name])
        return folders[name]

    return make


@pytest.fixture(scope="session")
def calls() -> dict[str, dict[str, Any]]:
    """What the pipelines are asked in tests: as little as shows everything."""
    short = {"max_sequence_length": 3}
    asked = {"sd3": short, "flux": short, "pixart": short | {"use_resolution_binning": False}}
    return {name: asked.get(name, {}) for name in PIPELINES}


@pytest.fixture(scope="session")
def exported(
    tiny: Callable[[str], Path], calls: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name in PIPELINES -> an output of shrink with an artifact onnx-fp32, made once for all
    processes that share the tests; what is written there is read alone."""
    from dotexport.diffusion import onnx_folder
    from dotexport.diffusion.pipeline_options import LayoutOptions, SampleOptions, ShrinkOptions
    from dotexport.diffusion.pipeline_shrinking import shrink

    base = tmp_path_factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str) -> Path:
        folder = home / f"exported-{name}"
        done = folder / "out" / "onnx-fp32"  # it appears whole
        with locked(folder, wait=True):
            if done.is_dir():
                return done.parent
            folder.mkdir()
            prompts = folder / "prompts.txt"
            prompts.write_text("1\n3\n7\n" if name == "dit" else "one\nthree\nseven\n")
            size = None if name == "dit" else 16
            options = SampleOptions(
                prompts=str(prompts),
                steps=2,
                guidance=2.0,
                height=size,
                width=size,
                extra=calls[name],
            )
            layout = LayoutOptions(heads="0.5x", ffn="0.5x")
            shrink(tiny(name), done.parent, ShrinkOptions(sampling=options, layout=layout))
            onnx_folder.export(done.parent, ["onnx"])
        return done.parent

    return make


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts; for class-conditional pipelines the same as numbers."""
    file = tmp_path / "prompts.txt"
    file.write_text("one\nthree\n\nseven\n", encoding="utf-8")
    return file


def spread(pipe: Any) -> None:
    """Weights large enough that every layer matters; fresh ones hardly show in the output."""
    for name in ("transformer", "unet"):
        model = getattr(pipe, name, None)
        for key, parameter in model.named_parameters() if model is not None else ():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.15)
            elif "bias" in key:
                torch.nn.init.normal_(parameter, 0.0, 0.1)


def _vae(channels: int, **config: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **config,
    )


def _t5(width: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=13, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )


def _clip(layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=3,
        eos_token_id=12,
        projection_dim=32,
    )


def sd3() -> Any:
    """SD3.5: norms on queries and keys, dual attention in one block, a VAE and a T5."""
    from diffusers import SD3Transformer2DModel
    from transformers import T5EncoderModel

    from dotexport.bench.tables import digits

    pipe = digits.mmdit_pipeline()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    t5 = _t5(64)
    return type(pipe)(
        **pipe.components
        | {
            "transformer": transformer,
            "vae": _vae(4, shift_factor=0.1),
            "text_encoder_3": T5EncoderModel(t5),
            "tokenizer_3": digits.word_tokenizer(),
        }
    )


def flux() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel, T5EncoderModel

    from dotexport.bench.tables import digits

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    clip = _clip(1)
    t5 = _t5(32)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift_factor=0.1),
        text_encoder=CLIPTextModel(clip),
        tokenizer=digits.word_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=digits.word_tokenizer(),
    )


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
    )
    return DiTPipeline(transformer=transformer, vae=_vae(4), scheduler=DDIMScheduler())


def unet() -> Any:
    """SD 1.5: GEGLU and cross attention."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from dotexport.bench.tables import digits

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(4, 4),
        norm_num_groups=4,
    )
    clip = _clip(1)
    return StableDiffusionPipeline(
        unet=model,
        vae=_vae(4),
        text_encoder=CLIPTextModel(clip),
        tokenizer=digits.word_tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
    )


def pixart() -> Any:
    """Cross attention beside self-attention, and a T5 with a mask."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5EncoderModel

    from dotexport.bench.tables import digits

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )
    t5 = _t5(32)
    return PixArtSigmaPipeline(
        transformer=transformer,
        vae=_vae(4),
        text_encoder=T5EncoderModel(t5),
        tokenizer=digits.word_tokenizer(),
        scheduler=DDIMScheduler(),
    )


def sdxl() -> Any:
    """Two text encoders, added conditions, transformers of several blocks."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )

    from dotexport.bench.tables import digits

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # six numbers of 8, and the pooled 32
        norm_num_groups=4,
    )
    clip = _clip(2)
    return StableDiffusionXLPipeline(
        unet=model,
        vae=_vae(4),
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer=digits.word_tokenizer(),
        tokenizer_2=digits.word_tokenizer(),
        scheduler=EulerDiscreteScheduler(),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
    "unet": unet,
    "pixart": pixart,
    "sdxl": sdxl,
}
