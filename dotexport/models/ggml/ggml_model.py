"""A GGUF file as a stock model: config.json, and tensors under the names of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from dotexport.errors import CheckpointError
from dotexport.models.family import Family
from dotexport.models.ggml.ggml_config import FAMILIES, read_config
from dotexport.models.ggml.ggml_file import EXACT, GgufFile, sound
from dotexport.models.ggml.ggml_rope import FACTORS
from dotexport.models.shapes import read_sizes, shapes

INTERLEAVED = {"llama", "granite", "smollm3"}  # they turn neighbours of a head by one angle
HARMLESS = (".attn_rot_embd", ".rotary_emb.inv_freq")  # what every reader computes


def interleaved(tensor_N: torch.Tensor, heads: int) -> torch.Tensor:
    """The two halves of every head, one row of each in turn; a matrix or a bias.

    >>> interleaved(torch.arange(8), heads=2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = tensor_N.reshape(heads, 2, -1, *tensor_N.shape[1:])
    return halves.transpose(1, 2).reshape(tensor_N.shape).contiguous()


def parted(tensor_N: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`.

    >>> parted(interleaved(torch.arange(8), heads=2), heads=2)
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    turns = tensor_N.reshape(heads, -1, 2, *tensor_N.shape[1:])
    return turns.transpose(1, 2).reshape(tensor_N.shape).contiguous()


@dataclass(frozen=True)
class GgufModel:
    """Attributes:
    file: what is read.
    family, config: the class that it is read as, and its config.json.
    shapes: tensor of that class -> its shape.
    stored: tensor of that class -> its name in the file; None: a bias of zeros.
    """

    file: GgufFile
    family: Family
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str | None]

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Read the header; no weights.

        Raises:
            CheckpointError: a damaged file, or tensors that its sizes do not call for.
            UnsupportedModelError: no class of ours computes this.
        """
        file = GgufFile.open(path)
        with sound(path):
            family, config = read_config(file)
            expected = dict(shapes(family, read_sizes(family, config)))
            stored = dict(_names(file, expected, config["num_hidden_layers"]))
            model = cls(file, family, config, expected, stored)
            model._check()
        return model

    def _check(self) -> None:
        left = set(self.file.tensors) - {*self.stored.values(), FACTORS}
        if foreign := sorted(name for name in left if not any(h in name for h in HARMLESS)):
            raise CheckpointError(
                f"{self.file.path} holds {', '.join(foreign[:3])} beside what its sizes call for "
                f"({len(foreign)} tensors); take an undamaged copy, or the model it was made from"
            )
        for name, stored in self.stored.items():
            if stored and self.file.shape(stored) != self.shapes[name]:
                raise CheckpointError(
                    f"{stored} in {self.file.path} is stored as {self.file.shape(stored)} where "
                    f"the sizes of the file call for {self.shapes[name]}; take an undamaged copy"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the class, in float32.

        Raises:
            CheckpointError, UnsupportedModelError: it cannot be read.
        """
        stored = self.stored[name]
        if stored is None:
            return torch.zeros(self.shapes[name])
        values = self.file.tensor(stored)
        heads = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
        for part, key in heads.items():
            if part in name and self.file.architecture in INTERLEAVED:
                values = parted(values, self.config[key])
        return values - 1 if self._is_offset(name) else values

    def dtype(self) -> torch.dtype:
        """The narrowest in which every tensor is exact: that of the matrices, or float32."""
        matrices = [s for n, s in self.stored.items() if s and len(self.shapes[n]) > 1]
        kinds = {self.file.tensors[stored].tensor_type for stored in matrices}
        dtype = EXACT.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
        small = (name for name, shape in self.shapes.items() if len(shape) == 1)
        return dtype if all(self._survives(name, dtype) for name in small) else torch.float32

    def _survives(self, name: str, dtype: torch.dtype) -> bool:
        """Whether what the file holds can be told from the rounded tensor."""
        values = self.tensor(name)
        back = values.to(dtype).float()
        offset = 1.0 if self._is_offset(name) else 0.0
        return torch.equal(back + offset, values + offset)

    def _is_offset(self, name: str) -> bool:
        """llama.cpp multiplies by the weight of every norm; some classes by one more than it."""
        return self.family.unit_offset and name.endswith("norm.weight")


def _names(
    file: GgufFile, expected: Mapping[str, tuple[int, ...]], layers: int
) -> Iterator[tuple[str, str | None]]:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name in FAMILIES}
    names = gguf.get_tensor_name_map(known[file.architecture], layers)
    for name in expected:
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in file.tensors:
            yield name, stored
        elif name.endswith(".bias"):
            yield name, None
        else:
            raise CheckpointError(f"{file.path} lacks {stored or name}; take a complete copy")
