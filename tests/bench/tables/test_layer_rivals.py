"""Rivals that drop layers: what does nothing leaves first, and without a trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dotexport.bench.tables.layer_rivals import RIVALS, without_layers

WINDOWS_NL = torch.randint(3, 90, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rival", RIVALS)
def test_layers_that_add_nothing_leave_without_a_trace(
    rival: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    shared = tiny_model(model_type="llama", num_hidden_layers=6)
    model = shutil.copytree(shared, tmp_path / "model")
    silent = tuple(f"model.layers.{layer}." for layer in (3, 4))
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.startswith(silent) and name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        save_file(tensors, file, metadata={"format": "pt"})
    said = without_layers(rival, model, tmp_path / "out", 2, WINDOWS_NL)
    assert said == "without 3, 4"
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(WINDOWS_NL).logits
        for folder in (model, tmp_path / "out")
    )
    # The map that ReplaceMe folds in is solved for, in float64.
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
