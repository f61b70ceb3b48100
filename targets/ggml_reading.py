"""A GGUF file as a stock model of torch, dequantised to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dotexport.models.ggml.ggml_model import GgufModel
from dotexport.models.rope import stock_config


def read_model(file: Path) -> Any:
    """The model of a file that `dotexport.targets.ggml` wrote.

    Raises:
        CheckpointError: a damaged file, or a tensor that is missing or left over.
        UnsupportedModelError: no class of transformers computes this.
    """
    from transformers import AutoModelForCausalLM

    from dotexport.models.loading import no_initial_values

    stored = GgufModel.open(file)
    classes: Any = AutoModelForCausalLM
    with no_initial_values():
        config = stock_config({**stored.config, "pad_token_id": None})
        model: Any = classes.from_config(config, dtype=torch.float32)
    model.tie_weights()  # skipping the initial values skips this too
    for name, parameter in model.named_parameters():  # a tied table comes up once
        parameter.data.copy_(stored.tensor(name))
    return model.eval()
