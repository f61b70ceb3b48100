"""LFM2: the width that its class builds is read and written; channels leave with the stream."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.errors import CheckpointError
from dotexport.models.config_words import settled
from dotexport.models.rope import stock_config
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.targets.vllm_tokens import Vllm

Tiny = Callable[..., Path]
LATER = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="refused there")


@LATER
@pytest.mark.parametrize(
    "words",
    [
        {"block_ff_dim": 200, "block_multiple_of": 64},
        {"intermediate_size": 200, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 8},
        {"intermediate_size": 200, "block_auto_adjust_ff_dim": False},
    ],
)
def test_the_width_of_an_mlp_is_what_the_class_builds(words: dict[str, Any]) -> None:
    said = {"model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}
    config = said | heads | words | {"architectures": ["Lfm2ForCausalLM"], "tie_embedding": False}
    found = settled(config, of="here")
    built = []
    for one in (config, found):
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(stock_config(one))
        built.append(model.model.layers[0].feed_forward.w1.out_features)
    assert [found["intermediate_size"]] * 2 == built
    assert found["layer_types"] == ["conv", "full_attention"]
    assert not {"full_attn_idxs", "block_ff_dim", "tie_embedding"} & set(found)
    assert not found["tie_word_embeddings"]
    assert read_model(found)[1].intermediate_size == built[0]


@LATER
@pytest.mark.parametrize(
    "words",
    [
        {"layer_types": "conv"},
        {"block_ffn_dim_multiplier": "wide"},
        {"block_multiple_of": 0},
        {"intermediate_size": None},
    ],
)
def test_words_that_make_no_width_are_refused(words: dict[str, Any]) -> None:
    said = {"model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv"] * 2}
    config = said | heads | words | {"architectures": ["Lfm2ForCausalLM"]}
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model(settled(config, of="here"))


@LATER
@pytest.mark.parametrize("refit", [False, True])
def test_axes_and_channels_that_say_nothing_leave_without_a_trace(
    refit: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    """Another eight channels of each convolution, and eight directions of the stream that are no
    axes of it."""
    changes = {"model_type": "lfm2", "intermediate_size": 132, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_pretrained(tiny_model(**changes), dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    basis_DK = torch.linalg.qr(torch.randn(48, 40, generator=random))[0]
    project_DD = basis_DK @ basis_DK.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project_DD)
        for layer in model.model.layers:
            mixer = getattr(layer, "conv", None) or layer.self_attn
            for writer in (mixer.out_proj, layer.feed_forward.w2):
                writer.weight.copy_(project_DD @ writer.weight)
            if hasattr(layer, "conv"):
                mixer.out_proj.weight[:, torch.randperm(48, generator=random)[:8]] = 0
    folder = tmp_path / "planted"
    model.save_pretrained(folder)
    text = tmp_path / "letters.txt"
    letters = torch.randint(33, 120, (2000,), generator=random).tolist()
    text.write_text("".join(map(chr, letters)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model(**changes) / file, folder)
    options = ShrinkOptions(
        text=TextOptions(source=str(text), samples=12, seqlen=64),
        sizes=SizeOptions(hidden_size=40),
        narrow=NarrowOptions(basis="pca", refit=refit, local=None),
    )
    out = shrink(folder, tmp_path / "out", options, device="cpu").out
    narrowed: Any = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    assert narrowed.model.layers[0].conv.conv.weight.shape == (40, 1, 3)
    assert narrowed.config.norm_eps == pytest.approx(model.config.norm_eps * 48 / 40)
    tokens_BL = torch.randint(0, 90, (2, 24), generator=random)
    with torch.inference_mode():
        wanted_BLV = model(input_ids=tokens_BL, use_cache=False).logits
        found_BLV = narrowed(input_ids=tokens_BL, use_cache=False).logits
    # float32 in other coordinates; what a refit finds is as exact as its ridge is small.
    tolerance = (1e-4, 1e-3)[refit] * float(wanted_BLV.abs().max())
    assert (found_BLV - wanted_BLV).abs().max() < tolerance


def test_vllm_takes_heads_for_as_wide_as_the_stream_allows(tiny_model: Tiny) -> None:
    changes = {"model_type": "lfm2", "intermediate_size": 132, "head_dim": 12}
    config = open_source(tiny_model(**changes)).config
    assert not Vllm().config_problems(config, "as-stored")
    fewer = {**config, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert "keep all KV heads" in Vllm().config_problems(fewer, "as-stored")[0]
