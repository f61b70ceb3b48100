"""Tokens that are attention sinks wherever they stand: found, and put into what is fitted on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from dotexport.app import shrinking
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import load_float32
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import read_tokenizer, token_windows
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.sinks import EVERY, READ, TAIL, sinks, sown
from dotexport.narrowing.streams import held_out_windows
from dotexport.storage import manifest

TEXT = TextOptions(source="embedded:calibration", samples=24, seqlen=64)


@pytest.fixture(scope="module")
def separator() -> int:
    return int(read_tokenizer(MODEL_DIR).eos_token_id)


@pytest.fixture(scope="module")
def resting(separator: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose separator enters it 1,000 times as large, and makes a neuron of its
    own turn it into another direction."""
    folder = tmp_path_factory.mktemp("resting") / "model"
    shutil.copytree(MODEL_DIR, folder)
    tensors = load_file(folder / "model.safetensors")
    row_D = tensors["model.embed_tokens.weight"][separator].mul_(1000)
    direction_D = row_D / row_D.norm()
    mlp, gain_D = "model.layers.0.mlp", tensors["model.layers.0.post_attention_layernorm.weight"]
    tensors[f"{mlp}.gate_proj.weight"][0] = tensors[f"{mlp}.up_proj.weight"][0] = (
        direction_D / gain_D
    )
    other_D = torch.randn(len(row_D), generator=torch.Generator().manual_seed(0))
    # The norm gives the separator a length of sqrt(D), so the neuron is about D there.
    tensors[f"{mlp}.down_proj.weight"][:, 0] = (
        3 * row_D.norm() * other_D / other_D.norm() / len(row_D)
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _found(model: Path) -> tuple[int, ...]:
    windows_NL = token_windows(model, TEXT)
    return sinks(Checkpoint.open(model), windows_NL)


def test_only_what_is_massive_is_one(resting: Path, separator: int) -> None:
    assert _found(MODEL_DIR) == ()
    assert _found(resting) == (separator,)


@pytest.mark.parametrize(("count", "length"), [(48, 512), (7, 64), (1, 20), (128, 2048)])
def test_one_window_in_a_few_has_one(count: int, length: int) -> None:
    windows_NL = torch.full((count, length), 5)
    sown_NL = sown(windows_NL, (1, 2), seed=3)
    assert torch.equal(sown_NL, sown(windows_NL, (1, 2), seed=3))
    assert int((windows_NL != 5).sum()) == 0
    windows, places = torch.nonzero(sown_NL != 5, as_tuple=True)
    assert (places >= length - max(1, min(length, READ) // TAIL)).all()
    held = held_out_windows(count)
    for kind in (set(range(count)) - held, held):
        expected = sorted(kind)[::EVERY]
        assert sorted(kind & {*windows.tolist()}) == expected
    tokens = sown_NL[windows, places]
    assert set(tokens.tolist()) == ({1, 2} if len(tokens) > 1 else {1})
    assert torch.equal(sown(windows_NL, (), seed=3), windows_NL)


def _behind(model: Path, narrowed: Path, separator: int) -> float:
    """KL behind the separator in the middle of held-out text."""
    windows_NL = token_windows(
        MODEL_DIR, TextOptions(source="embedded:evaluation", samples=16, seqlen=64)
    )
    windows_NL[:, 20] = separator
    log_p: list[Tensor] = []
    with torch.inference_mode():
        for folder in (narrowed, model):
            said_NLV = load_float32(Checkpoint.open(folder))(input_ids=windows_NL).logits
            log_p.append(said_NLV[:, 20:].log_softmax(-1))
    return float(kl_div(*log_p, log_target=True, reduction="none").sum(-1).mean())


def test_what_follows_it_survives(
    resting: Path, separator: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it in the calibration text nothing tells that the token is to be kept."""
    options = ShrinkOptions(
        sizes=SizeOptions(intermediate_size=128),
        text=TEXT,
        other="none",
        narrow=NarrowOptions(local=None),
    )
    shrink(resting, tmp_path / "with", options)
    assert manifest.read(tmp_path / "with")["calibration"]["sinks"] == [separator]
    monkeypatch.setattr(shrinking, "sinks", lambda *asked, **how: ())
    shrink(resting, tmp_path / "without", options)
    assert "sinks" not in manifest.read(tmp_path / "without")["calibration"]
    lost, kept = (
        _behind(resting, tmp_path / name / "hf", separator) for name in ("without", "with")
    )
    assert kept < 0.7 * lost
