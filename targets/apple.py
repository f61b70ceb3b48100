"""MLX for Apple silicon: safetensors and config.json as `mlx_lm.convert` writes them.

`mlx_lm.load(folder)` reads it. int8 and int4 are MLX's own affine rounding of all matrices and
tables, a scale and an offset per group of a row; these and all else are bfloat16 then.
MLX computes on the GPU of a Mac, and on one core of another machine.

Shapes: B sequences, L new tokens, V vocabulary, O and I outputs and inputs of a matrix.
"""

from __future__ import annotations

import io
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from dotexport.exports.target import Logits, Tokens

from .apple_config import config_problems, group_size, mlx_config, query_scale, stream_scale

if TYPE_CHECKING:
    import torch

    from dotexport.models.checkpoint import Checkpoint
    from dotexport.models.family import Family
    from dotexport.models.shapes import Sizes

logger = logging.getLogger(__name__)

# bfloat16 where weights are rounded: no activation overflows it, and the error of int8 is larger.
NUMBERS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
NUMBERS |= dict.fromkeys(("int8", "int4"), "bfloat16")
BITS = {"int8": 8, "int4": 4}
GROUP = 32  # the smallest group of a row that MLX rounds together


class Mlx:
    """Writes and runs with mlx-lm."""

    name = "mlx"
    summary = "MLX for Apple silicon: what mlx_lm.load reads"
    precisions = ("fp16", "bf16", "fp32", "int8", "int4")
    exact_rounding = ()
    row_groups: ClassVar = dict.fromkeys(BITS, GROUP)
    cache_bytes: ClassVar = {name: 4 if name == "fp32" else 2 for name in precisions}

    def missing(self) -> list[str]:
        return []  # without mlx-lm this file cannot be imported

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .hf import HuggingFace

        stock = HuggingFace().problems(checkpoint, "as-stored")
        return stock + self.config_problems(checkpoint.config, precision)

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        return list(config_problems(config))

    def stored_bytes(self, family: Family, sizes: Sizes, precision: str) -> int:
        """Of all tensors of a model of these sizes."""
        return sum(_bytes_by_name(family, sizes, precision).values())

    def read_bytes(self, family: Family, sizes: Sizes, precision: str) -> int:
        """Of the tensors that a decoded token reads whole: all but a table that is no head too."""
        stored = _bytes_by_name(family, sizes, precision)
        table = 0 if sizes.tied else stored[f"{family.embedding}.weight"]
        return sum(stored.values()) - table

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        for file in checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        number = NUMBERS[precision]
        config: dict[str, Any] = mlx_config(checkpoint.config) | {"dtype": number}
        save_config(dict(config), folder / "config.json")
        # Without strict, a folder without weights gives a model whose weights are never drawn.
        model, _ = load_model(folder, lazy=True, strict=False)
        model.load_weights(list(_weights(checkpoint, getattr(mx, number))), strict=True)
        if precision in BITS:
            model, config = _rounded(model, config, BITS[precision])
        save_model(folder, model)
        save_config(config, folder / "config.json")

    def wrong_in_file(self, checkpoint: Checkpoint, folder: Path) -> list[str]:
        """Words of config.json and tensors that are not the checkpoint's."""
        from .apple_weights import wrong_in_file

        tensors = ((name, tensor.numpy()) for name, tensor in _tensors(checkpoint))
        return wrong_in_file(folder, mlx_config(checkpoint.config), tensors)

    def open(self, folder: Path, *, threads: int | None = None) -> MlxSession:
        """Load with mlx-lm.

        Without a GPU, integers are multiplied in float32, each number being what the file holds:
        MLX has no fast kernel for them in half precision on a CPU.

        Args:
            threads: nothing to set; MLX takes the GPU, or one core where it has none.
        """
        model, config = load_model(folder)
        if "quantization" in config and mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)
        return MlxSession(model)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every tensor that mlx-lm reads, in float32."""
    config = checkpoint.config
    tied = mlx_config(config)["tie_word_embeddings"]
    stream, query = stream_scale(config), query_scale(config)
    for name in checkpoint.files:
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue  # every reader computes the one and knows the other
        tensor = checkpoint.tensor(name).float()
        if stream != 1.0 and name.endswith(ADDED):
            tensor = (1 + tensor) * stream - 1
        if query != 1.0 and ".q_proj." in name:
            tensor = tensor * query
        yield name, tensor


# Norms of what a sublayer of Gemma 3 adds to the stream, which multiply by 1 + weight.
ADDED = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def _weights(checkpoint: Checkpoint, number: Any) -> Iterator[tuple[str, Any]]:
    for name, tensor in _tensors(checkpoint):
        array = mx.array(tensor.numpy()).astype(number)
        mx.eval(array)  # or the float32 of every tensor would wait in memory
        yield name, array


def _rounded(model: Any, config: dict[str, Any], bits: int) -> tuple[Any, dict[str, Any]]:
    """The model with MLX's rounding, and its config, which says so."""
    rows: dict[str, int] = {
        name: module.weight.shape[-1]
        for name, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }
    group = group_size(rows.values())
    kept = [name for name, width in rows.items() if width % group]
    if kept:
        logger.warning(
            "%d tensors stay bfloat16, because their rows are no multiple of %d: %s",
            *(len(kept), group, ", ".join(kept[:3])),
        )
    with redirect_stdout(io.StringIO()):  # it prints the mean bits
        rounded: tuple[Any, dict[str, Any]] = quantize_model(
            model, config, group, bits, quant_predicate=lambda *_: True
        )
    return rounded


def _bytes_by_name(family: Family, sizes: Sizes, precision: str) -> dict[str, int]:
    from dotexport.models.shapes import shapes

    whole = 4 if precision == "fp32" else 2
    found = dict(shapes(family, sizes))
    group = group_size(shape[-1] for shape in found.values() if len(shape) > 1)
    stored = {}
    for name, shape in found.items():
        number = math.prod(shape)
        stored[name] = number * whole
        if precision in BITS and len(shape) > 1 and shape[-1] % group == 0:
            stored[name] = number * BITS[precision] // 8 + number // group * 4
    return stored


class MlxSession:
    """A model of mlx-lm with the caches that mlx-lm makes for it.

    These have one length for a whole batch, so prompts of different lengths get caches of their
    own.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.caches: list[Any] = []
        self.apart = False

    @property
    def providers(self) -> tuple[str, ...]:
        """Where it computes, and in which numbers."""
        number = str(self.model.model.norm.weight.dtype).rpartition(".")[2]
        return (f"mlx on {mx.default_device().type.name}, {number}",)

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        self.apart = min(lengths) < L
        self.caches = [make_prompt_cache(self.model) for _ in range(B if self.apart else 1)]
        if not self.apart:
            return self._run(tokens_BL, self.caches[0])
        logits_BLV: Logits | None = None
        for row, (length, cache) in enumerate(zip(lengths, self.caches, strict=True)):
            said_LV = self._run(tokens_BL[row : row + 1, :length], cache)[0]
            if logits_BLV is None:
                logits_BLV = np.zeros((B, L, said_LV.shape[-1]), dtype=np.float32)
            logits_BLV[row, :length] = said_LV
        assert logits_BLV is not None
        return logits_BLV

    def step(self, tokens_B: Tokens) -> Logits:
        if not self.apart:
            return self._run(tokens_B[:, None], self.caches[0])[:, 0]
        alone = zip(tokens_B, self.caches, strict=True)
        return np.concatenate([self._run(token[None, None], cache)[0] for token, cache in alone])

    def _run(self, tokens_BL: Tokens, cache: Any) -> Logits:
        logits_BLV = self.model(mx.array(np.ascontiguousarray(tokens_BL)), cache=cache)
        return np.array(logits_BLV.astype(mx.float32))
