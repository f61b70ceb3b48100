"""A model folder on disk: config and tensors, read lazily by name and written as they are made.

The only reader and writer of weight files. The format is safetensors: eight bytes that hold the
length of a JSON header, the header, then the tensors one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dotexport.errors import CheckpointError
from dotexport.models.config_words import say_once, settled, stored_names, stored_slots
from dotexport.models.families import is_buffer
from dotexport.models.stacks import Slot
from dotexport.models.weight_files import (
    INDEX,
    WEIGHTS,
    has_weights,
    opened,
    same_values,
    tensor_files,
)
from dotexport.storage.reading import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# The same in every family; a table of another would have to say.
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"

# What travels with a model unchanged: tokenizer, chat template, generation defaults, licence.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor.

    Attributes:
        slot: where it lies in a tensor that files keep of all experts; None: it is one of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slot: Slot | None = None

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def in_file(self, name: str) -> tuple[str, TensorSpec]:
        """What a file has of it."""
        if self.slot is None:
            return name, self
        return self.slot.whole, TensorSpec(self.slot.whole_shape(self.shape), self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, sharded or not.

    Attributes:
        folder: where it lies.
        config: config.json as transformers reads it (models/config_words.py).
        files: tensor name -> file that holds it.
        stored: tensor name -> name in that file, where it may be another.
        slots: tensor of an expert -> where it lies in what that file has of all experts.
    """

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    stored: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    slots: Mapping[str, Slot] = field(default_factory=dict, kw_only=True)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config and tensor names; no weights, unless two answers must be compared.

        Raises:
            CheckpointError: not a model folder, a missing shard, a broken weight file, or two sets
                of weights that differ.
        """
        config, files = read_config(folder), tensor_files(folder)
        stored = stored_names(config, files)
        slots = {n: slot for n, slot in stored_slots(config).items() if slot.whole in stored}
        wholes = {slot.whole for slot in slots.values()}
        stored |= {name: stored[slot.whole] for name, slot in slots.items()}
        stored = {name: found for name, found in stored.items() if name not in wholes}
        places = {name: files[found] for name, found in stored.items()}
        return cls(folder, config, places, stored=stored, slots=slots)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor, from the headers alone."""
        specs: dict[str, TensorSpec] = {}
        names: dict[str, list[str]] = {}
        for name in self.files:
            names.setdefault(self.stored.get(name, name), []).append(name)
        for file in sorted(set(self.files.values())):
            with opened(file) as weights:
                for stored in weights.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                    if stored not in names:
                        continue
                    piece = weights.get_slice(stored)
                    shape, dtype = tuple(piece.get_shape()), _dtype(piece, stored, file)
                    for name in names[stored]:
                        slot = self.slots.get(name)
                        specs[name] = TensorSpec(slot.shape(shape) if slot else shape, dtype, slot)
        return specs

    @property
    def num_parameters(self) -> int:
        """Distinct weights, no buffers; a tied table that is stored once counts once."""
        return sum(spec.num_elements for name, spec in self.specs.items() if not is_buffer(name))

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, as stored.

        Raises:
            CheckpointError: no tensor of that name, or values that are not finite.
        """
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}, which its config.json calls for; "
                "is the download complete?"
            )
        stored, slot = self.stored.get(name, name), self.slots.get(name)
        with opened(self.files[name]) as weights:
            tensor: torch.Tensor
            if slot is None:
                tensor = weights.get_tensor(stored)
            else:
                [expert] = weights.get_slice(stored)[slot.expert : slot.expert + 1]
                tensor = slot.of(expert).contiguous()
        if not all_finite(tensor):
            raise CheckpointError(
                f"{name} in {self.files[name]} holds NaN or infinite values; "
                "expected finite weights: take an undamaged copy of the model"
            )
        return tensor

    def companions(self) -> list[Path]:
        """Tokenizer, generation config and licence files, which travel unchanged.

        Raises:
            CheckpointError: one is a link to a file that is not the model's.
        """
        found = {file for glob in COMPANIONS for file in self.folder.glob(glob)}
        files = sorted(file for file in found if file.is_file())
        for file in files:
            check_inside(file)
        return files


def all_finite(values: torch.Tensor) -> bool:
    """Whether none is NaN or infinite; the extremes tell, forty times faster than a mask."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def stored_config(folder: Path) -> dict[str, Any]:
    """config.json as it is written there.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no config.json; "
            "expected a transformers checkpoint (config.json and *.safetensors) or a diffusers "
            "pipeline (model_index.json)"
        )
    return read_json(file, advice="take a fresh copy", finite=True)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as transformers 5 reads it beside the weights that are there; of a model that
    sees or hears, that of its language model.

    Raises:
        CheckpointError: there is none, it is no JSON object, or its words contradict each other.
    """
    config = settled(stored_config(folder), of=folder)
    if config.get("tie_word_embeddings") and _has_own_head(folder, config):
        config["tie_word_embeddings"] = False
        say_once(
            f"{folder}: config.json says tie_word_embeddings, but the file holds a {HEAD} of other "
            "values: it is kept, as transformers 5 does"
        )
    return config


def check_inside(file: Path) -> None:
    """Refuse a link out of a model: what it leads to would travel with all that is made of it."""
    folder = file.parent.resolve()
    # snapshots/REVISION of the hub's cache holds links into blobs/ beside it.
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not (target := file.resolve()).is_relative_to(home):
        raise CheckpointError(
            f"{file} is a link to {target}, outside of the model; put a copy of the file in its "
            "place if it belongs to it"
        )


def _has_own_head(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a head that should be the embedding's table is another one."""
    if not has_weights(folder):
        return False
    files = tensor_files(folder)
    stored = stored_names(config, files)
    if HEAD not in stored or TABLE not in stored:
        return False
    head, table = stored[HEAD], stored[TABLE]
    return not same_values(head, files[head], table, files[table])


def _dtype(piece: Any, name: str, file: Path) -> torch.dtype:
    code = piece.get_dtype()
    if code not in DTYPES:
        raise CheckpointError(
            f"{name} in {file} is stored as {code}; expected one of {', '.join(DTYPES)}: "
            "take the unquantised model"
        )
    return DTYPES[code]


class CheckpointWriter:
    """Writes tensors into shards as they are made; memory holds one tensor at a time.

    Every shape is known before the first value is, so the headers are written first and each
    tensor goes straight to its place.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int = 4 << 30
    ) -> None:
        self.folder = folder
        self.specs = dict(specs)
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = set(self.specs)
        self._stored = dict(spec.in_file(name) for name, spec in self.specs.items())
        shards = list(_shards(self._stored, max_shard_bytes))
        for number, names in enumerate(shards, start=1):
            file = folder / shard_name(number, len(shards))
            self._places |= _write_header(file, {name: self._stored[name] for name in names})
        if len(shards) > 1:
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor, rounded to the dtype that was announced for it.

        Raises:
            CheckpointError: a value that this dtype cannot hold.
        """
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}, announced {spec.shape}")
        values = tensor.detach().to("cpu", spec.dtype).contiguous()
        if not all_finite(values):
            raise CheckpointError(
                f"{name} would hold NaN or infinite values in {spec.dtype}; "
                "convert the model to bfloat16 or float32 first"
            )
        if spec.slot:
            spec.slot.of(self._expert(spec.slot)).copy_(values)
        else:
            file, offset = self._places[name]
            with file.open("r+b") as stream:
                stream.seek(offset)
                stream.write(values.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def _expert(self, slot: Slot) -> torch.Tensor:
        """What a file has of one expert, mapped from there: rows of its parts may take turns."""
        (file, offset), whole = self._places[slot.whole], self._stored[slot.whole]
        size = whole.num_bytes // slot.experts
        mapped = np.memmap(file, np.uint8, "r+", offset + slot.expert * size, (size,))
        return torch.from_numpy(mapped).view(whole.dtype).view(whole.shape[1:])

    def finish(self) -> None:
        """Check that every announced tensor was written, and flush to disk."""
        if self._missing:
            raise ValueError(f"never written: {sorted(self._missing)}")
        for file in {file for file, _ in self._places.values()}:
            with file.open("r+b") as stream:  # Windows flushes only what is open for writing
                os.fsync(stream.fileno())

    def _write_index(self) -> None:
        weight_map = {name: file.name for name, (file, _) in self._places.items()}
        total = sum(spec.num_bytes for spec in self._stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    filled = 0
    for name, spec in specs.items():
        if names and filled + spec.num_bytes > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += spec.num_bytes
    yield names


def shard_name(number: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_header(file: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Path, int]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        code = DTYPE_CODES[spec.dtype]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        # Not a sparse file: a full disk should show now, not after an hour of work.
        reserve(stream.fileno(), 8 + len(text), end)
    data = 8 + len(text)
    return {name: (file, data + header[name]["data_offsets"][0]) for name in specs}


def reserve(descriptor: int, offset: int, num_bytes: int) -> None:
    """Take the space of a file now: with a sparse one, a full disk shows after hours of work."""
    if hasattr(os, "posix_fallocate") and num_bytes:
        os.posix_fallocate(descriptor, offset, num_bytes)
    else:
        os.truncate(descriptor, offset + num_bytes)
