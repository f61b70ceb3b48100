"""Checkpoints with random weights: as fast as trained ones, for sizes that nobody has trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dotexport import embedded
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from dotexport.models.families import find_family
from dotexport.models.shapes import read_sizes, shapes, slots
from dotexport.storage.files import write_json

SCALE = 0.04  # of matrices; large enough for finite, distinct logits
TOKENIZER = tuple(embedded.MODEL_DIR / n for n in ("tokenizer.json", "tokenizer_config.json"))

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_stand_in(
    folder: Path,
    config: Mapping[str, Any],
    companions: Iterable[Path] = (),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Checkpoint:
    """Write a checkpoint of this config.json into a new or empty folder.

    Args:
        companions: files that travel with it, a tokenizer among them.

    Raises:
        UnsupportedModelError, CheckpointError: no config of a known family.
    """
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", dict(config))
    for file in companions:
        shutil.copyfile(file, folder / file.name)
    family = find_family(config)
    sizes = read_sizes(family, config)
    places = slots(family, sizes)
    specs = {n: TensorSpec(shape, dtype, places.get(n)) for n, shape in shapes(family, sizes)}
    writer = CheckpointWriter(folder, specs)
    generator = torch.Generator().manual_seed(seed)
    for name, spec in specs.items():
        writer.write(name, _values(spec, generator))
    writer.finish()
    return Checkpoint.open(folder)


def _values(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """Norms (and biases) of one, everything else Gaussian."""
    if len(spec.shape) == 1:
        return torch.ones(spec.shape)
    return torch.randn(spec.shape, generator=generator) * SCALE
