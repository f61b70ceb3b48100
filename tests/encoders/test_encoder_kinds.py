"""What ModernBERT and DeBERTa have that BERT has not: gates, layers that see part of the text,
writers without biases, distances in their attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from dotexport.app.cli import app
from dotexport.encoders import encoder_folder
from dotexport.encoders.encoder_folder import Encoder, open_encoder, save_encoder
from dotexport.encoders.encoder_sizes import Sizes, choose_layers, num_parameters, parameters_after
from dotexport.encoders.encoder_walk import _merges, _Site, _starts, cut, walk
from dotexport.encoders.kinds import FULL, LOCAL, PERIOD, TYPES, layer_types, period
from dotexport.encoders.pooling import Pooling
from dotexport.encoders.sentences import Batch
from dotexport.errors import CheckpointError, UnsupportedModelError
from dotexport.merging.refit import Moments

Made = Callable[[Path, str], Path]
NEW = ["modernbert", "deberta-v2"]
READS_TYPES = hasattr(transformers.ModernBertConfig(), TYPES)
"""Before transformers 5 it does not."""


def some_text(length: int = 12) -> list[Batch]:
    """Of several lengths, padded."""
    dice = torch.Generator().manual_seed(0)
    made = []
    for held in (False, False, True):
        tokens_NL = torch.randint(4, 200, (16, length), generator=dice)
        mask_NL = (torch.arange(length) < torch.randint(5, length + 1, (16, 1))).long()
        made.append(Batch({"input_ids": tokens_NL * mask_NL, "attention_mask": mask_NL}, held))
    return made


@torch.no_grad()
def said(model: Any, batch: Batch) -> Tensor:
    hidden: Tensor = model.base_model(**batch.inputs).last_hidden_state
    return hidden[batch.mask]


def distance(model: nn.Module, original: nn.Module, batch: Batch) -> float:
    wanted = said(original, batch)
    return float((said(model, batch) - wanted).norm() / wanted.norm())


@torch.no_grad()
def copy_neurons(encoder: Encoder) -> None:
    """The second half of every MLP computes what the first half does; where a factor follows the
    activation, upside down, and written the other way round."""
    for layer in encoder.layers:
        reader: Any = layer.get_submodule(encoder.kind.reader)
        writer: Any = layer.get_submodule(encoder.kind.writer)
        half = writer.in_features // 2
        for parameter in reader.parameters():
            for sign, block in zip((1, -1), parameter.split(writer.in_features), strict=False):
                block[half:] = sign * block[:half]
        writer.weight[:, half:] = 0.5 * writer.weight[:, :half]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("method", ["dot", "obs"])
def test_copies_of_neurons_leave_without_a_trace(
    name: str, method: str, made: Made, tmp_path: Path
) -> None:
    encoder = open_encoder(made(tmp_path / "model", name))
    copy_neurons(encoder)
    held = (batches := some_text())[-1]
    walked = walk(encoder, batches, range(len(encoder.layers)), 32, method)
    # The ridge that held-out tokens prefer and float32 sums leave about 1e-6.
    assert distance(walked.model, encoder.model, held) < 1e-4
    torch.manual_seed(1)  # and neurons that are no copies leave one
    for layer in encoder.layers:
        nn.init.normal_(layer.get_submodule(encoder.kind.reader).weight)  # type: ignore[arg-type]
    walked = walk(encoder, batches, range(len(encoder.layers)), 32, method)
    assert distance(walked.model, encoder.model, held) > 1e-2


def test_a_neuron_stands_for_one_that_is_turned_upside_down(made: Made, tmp_path: Path) -> None:
    encoder = open_encoder(made(tmp_path / "model", "modernbert"))
    copy_neurons(encoder)
    layer = encoder.layers[0]
    x_TD = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    handle = layer.mlp.Wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    layer.mlp(x_TD)  # type: ignore[operator]
    handle.remove()
    moments = Moments.zeros(64, 24)
    moments.add(seen[0].detach(), x_TD)
    kept = torch.arange(32)
    [merge] = _merges(moments, layer.mlp.Wo.weight.detach(), kept, turns=True)  # type: ignore[union-attr]
    assert merge.moved > 0.99
    merged_TK = _Site(encoder, layer, range(1), [], [])._merged(merge, x_TD)
    assert torch.allclose(merged_TK, seen[0][:, :32], atol=1e-5)  # float32


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_layers_are_called_as_the_model_calls_them(name: str, made: Made, tmp_path: Path) -> None:
    """Each with its own mask and positions; the text is longer than what is near."""
    encoder = open_encoder(made(tmp_path / "model", name))
    batch = some_text(length=40)[0]
    [stream] = _starts(encoder, [batch])
    for number, layer in enumerate(encoder.layers):
        stream.hidden = stream.through(layer, number)
    last: Any = getattr(encoder.base, "final_norm", nn.Identity())
    assert torch.equal(last(stream.hidden)[batch.mask], said(encoder.model, batch))


@pytest.mark.parametrize("name", NEW)
def test_a_layer_that_adds_nothing_is_found_and_leaves_without_a_trace(
    name: str, made: Made, tmp_path: Path
) -> None:
    encoder = open_encoder(made(tmp_path / "model", name))
    kind, silent = encoder.kind, 1
    with torch.no_grad():
        for writer in (kind.attention, kind.writer):
            for parameter in encoder.layers[silent].get_submodule(writer).parameters():
                parameter.zero_()
        for module in encoder.layers.modules():  # norms do nothing to what was normalised
            if isinstance(module, nn.LayerNorm) and kind.norm:
                module.weight.fill_(1)
                module.bias.zero_()
    batches = some_text()
    depth = len(encoder.layers) - 1
    [_, kept] = choose_layers(encoder, batches[-1:], Pooling(), depth)
    assert silent not in kept
    assert distance(cut(encoder, kept), encoder.model, batches[-1]) < 1e-5  # float32
    if not kind.norm:  # else the one before it is asked for what was normalised once more
        walked = walk(encoder, batches, kept, 64, "obs")
        assert distance(walked.model, encoder.model, batches[-1]) < 1e-5


@pytest.mark.parametrize("name", NEW)
def test_parameters_are_foretold(name: str, made: Made, tmp_path: Path) -> None:
    """The first layer of ModernBERT has a norm less, and leaves never."""
    encoder = open_encoder(made(tmp_path / "model", name))
    for depth in (1, 2):
        model = walk(encoder, some_text(), range(depth), 24, "select").model
        assert parameters_after(encoder, Sizes(24, depth, 24)) == num_parameters(model)


@pytest.mark.parametrize(
    ("kept", "every"), [([0, 2, 3, 4, 5], None), ([0, 1, 3, 5], 2), ([0, 3], 1), ([0, 1, 2], 3)]
)
def test_layers_see_as_much_as_before(
    kept: list[int], every: int | None, made: Made, tmp_path: Path
) -> None:
    """Of the original's layers the first and the fourth see all of the text."""
    encoder = open_encoder(made(tmp_path / "model", "modernbert-deep"))
    model = cut(encoder, kept)
    save_encoder(encoder, model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    types = [FULL if number in (0, 3) else LOCAL for number in kept]
    assert config[TYPES] == types
    assert config["num_hidden_layers"] == len(kept)
    assert config[PERIOD] == every
    if every is not None:  # both ways of saying it say the same
        assert layer_types({**config, TYPES: None}) == types
    long = some_text(length=40)[0]  # most of it out of sight of what is near
    if every is None and not READS_TYPES:
        with pytest.raises(UnsupportedModelError, match="reads global_attn_every_n_layers alone"):
            open_encoder(tmp_path / "out")
        return
    again = open_encoder(tmp_path / "out")
    assert torch.equal(said(again.model, long), said(model, long))


def test_layers_leave_so_that_every_release_can_say_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "model", "modernbert-deep")
    encoder = open_encoder(folder)
    with torch.no_grad():  # what would leave first
        for writer in ("attn.Wo", "mlp.Wo"):
            encoder.layers[2].get_submodule(writer).weight.zero_()  # type: ignore[operator]
    judges = some_text()[-1:]
    monkeypatch.setattr(encoder_folder, "_reads_types", lambda config: False)
    for kept in choose_layers(encoder, judges, Pooling(), 1):
        assert period([layer_types(encoder.config)[number] for number in kept])
    monkeypatch.undo()
    if READS_TYPES:
        assert choose_layers(encoder, judges, Pooling(), 1)[1] == [0, 1, 3, 4, 5]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[TYPES] = [FULL, LOCAL, LOCAL, LOCAL, LOCAL, FULL]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(encoder_folder, "_reads_types", lambda config: False)
    with pytest.raises(UnsupportedModelError, match="reads global_attn_every_n_layers alone"):
        open_encoder(folder)


def refusal(model: Path, out: Path, text: str) -> BaseException:
    asked = ["shrink", str(model), "-o", str(out), "--layers", "1", "--calib", text]
    result = CliRunner().invoke(app, asked)
    assert result.exception is not None
    assert not out.exists()
    return result.exception


@pytest.mark.parametrize(
    ("name", "word", "value", "error", "reason"),
    [
        ("deberta-v2", "conv_kernel_size", 3, UnsupportedModelError, "a convolution adds to its"),
        ("modernbert", TYPES, [FULL], CheckpointError, "has 1 layer_types and 4 layers"),
        ("modernbert", "intermediate_size", "64", CheckpointError, "does not load as ModernBert"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_with_a_reason(
    name: str,
    word: str,
    value: Any,
    error: type[Exception],
    reason: str,
    text: str,
    made: Made,
    tmp_path: Path,
) -> None:
    model = made(tmp_path / "model", name)
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {word: value}), encoding="utf-8")
    found = refusal(model, tmp_path / "out", text)
    assert isinstance(found, error)
    assert reason in str(found)
