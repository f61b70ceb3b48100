"""Layers of several kinds: counted, narrowed and read from files by what each kind has.

Shapes: B texts, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dotexport import embedded
from dotexport.app.cli import app
from dotexport.app.opening import open_source
from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import CheckpointError, SizeError
from dotexport.merging.heads import Groups, head_by_head, query_and_gate, whole
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import SUPPORTED
from dotexport.models.loading import load_float32
from dotexport.models.shapes import (
    Sizes,
    cached_numbers,
    num_multiplications,
    num_parameters,
    shapes,
)
from dotexport.models.text_windows import token_windows
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.depth import may_leave
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import prepare
from dotexport.sizes.budget import plan

from .changed_models import TOKENS_BL, letters, logits, rewritten

QWEN3_5 = SUPPORTED["Qwen3_5ForCausalLM"]
FULL, LINEAR = "full_attention", "linear_attention"
WHOLE = Sizes(
    hidden_size=48,
    intermediate_size=88,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_layers=4,
    vocab_size=90,
    tied=False,
    kinds=(LINEAR, LINEAR, FULL, LINEAR),
    fixed=(
        ("delta_key", 32),
        ("delta_value", 32),
        ("delta_heads", 4),
        ("delta_head_dim", 8),
        ("delta_kernel", 4),
    ),
)

Tiny = Callable[..., Path]


@pytest.fixture
def hybrid(tiny_model: Tiny) -> Tiny:
    return lambda **changes: tiny_model(model_type="qwen3_5_text", **changes)


def narrowed(
    folder: Path, out: Path, sizes: SizeOptions, basis: np.ndarray | None = None
) -> torch.Tensor:
    """Logits behind a closed form without any fit."""
    source = open_source(folder)
    decided = plan(source.config, sizes)
    (out / "hf").mkdir(parents=True)
    windows_NL = token_windows(folder, letters(out))
    run = prepare(
        *(source, decided, out, CalibrationText(windows_NL)),
        NarrowOptions(refit=False, local=None),
    )
    if basis is None:
        basis = np.eye(decided.before.hidden_size)
    run.run(Basis(basis, "given", 1.0))
    run.writer.finish()
    return logits(out / "hf")


# Counting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_before_it_is_known_which_layers_stay_parameters_are_the_most_they_can_be(
    count: int,
) -> None:
    asked = replace(WHOLE, num_layers=count)
    choices = [asked.of_layers(kept) for kept in combinations(range(4), count)]
    counted = [num_parameters(QWEN3_5, sizes) for sizes in choices]
    assert counted == [
        sum(torch.Size(shape).numel() for _, shape in shapes(QWEN3_5, sizes)) for sizes in choices
    ]
    assert num_parameters(QWEN3_5, asked) == max(counted)


def test_only_layers_with_attention_have_a_cache_that_grows() -> None:
    assert cached_numbers(QWEN3_5, WHOLE) == 2 * 2 * 32
    wider = replace(WHOLE, kinds=(LINEAR, FULL, FULL, LINEAR))
    assert cached_numbers(QWEN3_5, wider) == 2 * cached_numbers(QWEN3_5, WHOLE)


def test_products_are_those_of_the_matrices_that_there_are() -> None:
    every = {name: shape for name, shape in shapes(QWEN3_5, WHOLE) if len(shape) == 2}
    del every["model.embed_tokens.weight"]
    expected = sum(rows * columns for rows, columns in every.values())
    assert num_multiplications(QWEN3_5, WHOLE) == expected


def test_the_first_layer_and_the_last_of_a_kind_never_leave() -> None:
    assert may_leave([0, 1, 2, 3], WHOLE) == [1, 3]
    assert may_leave([0, 2], WHOLE) == []
    assert may_leave([0, 1, 2, 3], replace(WHOLE, kinds=())) == [1, 2, 3]


# config.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [[LINEAR, FULL], [LINEAR, LINEAR, "sliding_attention", FULL]])
def test_kinds_that_are_not_one_for_each_layer_are_refused(hybrid: Tiny, kinds: list[str]) -> None:
    config = {**open_source(hybrid()).config, "layer_types": kinds}
    with pytest.raises(CheckpointError, match="layer_types"):
        read_model(config)


def test_a_period_is_said_layer_by_layer_so_that_layers_can_leave(
    hybrid: Tiny, tmp_path: Path
) -> None:
    said = {"layer_types": None, "full_attention_interval": 2}
    folder = rewritten(
        hybrid(layer_types=[LINEAR, FULL] * 2), tmp_path / "model", lambda _: None, **said
    )
    config = open_source(folder).config
    assert config["layer_types"] == [LINEAR, FULL, LINEAR, FULL]
    family, before = read_model(config)
    after = resized(before, {"num_hidden_layers": 3})
    found = Plan(family, before, after, layers=(0, 2, 3)).config(config)
    assert found["layer_types"] == [LINEAR, LINEAR, FULL]
    assert "full_attention_interval" not in found


def test_fewer_layers_than_kinds_are_refused(hybrid: Tiny) -> None:
    config = open_source(hybrid()).config
    with pytest.raises(SizeError, match="a layer of each kind"):
        plan(config, SizeOptions(num_hidden_layers=1))


def test_heads_for_further_tokens_are_left_out_and_names_of_a_text_part_read(
    hybrid: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def as_saved(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensors.pop(name)
        tensors["mtp.fc.weight"] = torch.ones(48, 96)

    folder = rewritten(hybrid(), tmp_path / "model", as_saved, mtp_num_hidden_layers=1)
    plain, found = Checkpoint.open(hybrid()), Checkpoint.open(folder)
    assert "mtp*" in caplog.text
    assert found.specs == plain.specs
    assert "mtp_num_hidden_layers" not in found.config
    same = narrowed(folder, tmp_path / "out", SizeOptions(intermediate_size=88))
    assert (same - logits(hybrid())).abs().max() < 1e-4  # float32, norms folded into readers
    streamed = load_float32(found)
    with torch.inference_mode():
        assert torch.equal(streamed(input_ids=TOKENS_BL).logits, logits(hybrid()))


# Exactness ----------------------------------------------------------------------------------------


def test_queries_and_gates_come_apart_and_together_again() -> None:
    rows_MX = torch.arange(48.0).view(24, 2)
    query_NX, gate_NX = query_and_gate(rows_MX, 4)
    assert torch.equal(query_NX[:5, 0], torch.tensor([0.0, 2, 4, 6, 16]))
    assert torch.equal(head_by_head(query_NX, gate_NX, 4), rows_MX)


def test_a_group_keeps_its_queries_with_their_gates() -> None:
    rows_MX = torch.arange(32.0)[:, None]  # two groups of two heads, each of four rows twice
    kept = whole(Groups(2, 2, 4), torch.tensor([1]))
    assert torch.equal(kept.rows("gated_query", rows_MX), rows_MX[16:])


@pytest.mark.parametrize("kind", ["qwen3_5_text", "granitemoehybrid"])
def test_copies_of_neurons_and_of_groups_with_their_gates_leave_without_a_trace(
    kind: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    """Where gate and up are one matrix, too."""

    def with_copies(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if any(part in name for part in ("gate_proj", "up_proj", "input_linear")):
                for part in tensor.split(88):
                    part[64:] = part[:24]
            elif any(part in name for part in ("self_attn.q_proj", "k_proj", "v_proj")):
                tensor[len(tensor) // 2 :] = tensor[: len(tensor) // 2]

    folder = rewritten(tiny_model(model_type=kind), tmp_path / "model", with_copies)
    sizes = SizeOptions(intermediate_size=64, num_key_value_heads=1)
    before, after = logits(folder), narrowed(folder, tmp_path / "out", sizes)
    # Weights move onto the copies by solves in float64, damped by 1e-9; sums are float32.
    assert (before - after).abs().max() < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("tied", [False, True])
def test_a_stream_that_lies_in_fewer_axes_stays_what_it_was(
    hybrid: Tiny, tmp_path: Path, tied: bool
) -> None:
    """Norms of queries, of keys and of what a delta net gives have the epsilon of the stream's."""

    def in_40_axes(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "embed_tokens" in name:
                tensor[:, 40:] = 0
            elif any(writer in name for writer in ("o_proj", "out_proj", "down_proj")):
                tensor[40:] = 0

    made = hybrid(layer_types=[LINEAR, FULL] * 2, tie_word_embeddings=tied)
    # So large that a wrong one shows.
    folder = rewritten(made, tmp_path / "model", in_40_axes, rms_norm_eps=1e-2)
    sizes = SizeOptions(hidden_size=40)
    before = logits(folder)
    after = narrowed(folder, tmp_path / "out", sizes, np.eye(48)[:, :40])
    # Float32 through four layers.
    assert (before - after).abs().max() < 1e-4 * float(before.abs().max())


# The command line ---------------------------------------------------------------------------------


def test_every_axis_at_once_through_the_command_line_is_verified(
    hybrid: Tiny, tmp_path: Path
) -> None:
    rows = json.loads((embedded.MODEL_DIR / "config.json").read_text())["vocab_size"]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    folder = rewritten(hybrid(vocab_size=rows), tmp_path / "model", lambda _: None, **ids)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded.MODEL_DIR / name, folder / name)
    axes = "--hidden 40 --intermediate 64 --kv-heads 1 --layers 3 --vocab 512"
    text = "--calib embedded:calibration --other embedded:evaluation --samples 8 --seqlen 64"
    run, out = CliRunner(), tmp_path / "out"
    made = run.invoke(app, f"shrink {folder} -o {out} {axes} {text} --heal none")
    assert made.exit_code == 0, made.output
    assert run.invoke(app, ["verify", str(out)]).exit_code == 0
    config = json.loads((out / "hf/config.json").read_text())
    record = json.loads((out / "dotexport.json").read_text())
    kept = json.loads((out / "reports/shrink.json").read_text())["kept_layers"]
    kinds = [LINEAR, LINEAR, LINEAR, FULL]
    assert config["layer_types"] == [kinds[layer] for layer in kept]
    assert len(kept) == config["num_hidden_layers"] == 3
    model: Any = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert record["sizes"]["parameters"][1] == model.num_parameters()
    assert (model.config.hidden_size, model.config.vocab_size) == (40, 512)
