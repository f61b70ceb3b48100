"""A GGUF file as it lies on disk: header and tensors, read by the gguf package, within bounds.

Tensors are mapped into memory and dequantised one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from dotexport.errors import CheckpointError, UnsupportedModelError

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
MOST_ITEMS = 1 << 23  # of an array in the header: the largest vocabularies have 2^18 tokens
Type = gguf.GGMLQuantizationType
EXACT = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
# What the package raises on bytes that are no GGUF file: it checks few of them.
BROKEN = (ValueError, LookupError, ArithmeticError, TypeError, EOFError, RecursionError)


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Says of a file what Python says of what it holds: numbers that are texts, ids without end.

    Raises:
        CheckpointError: something broke.
    """
    try:
        yield
    except BROKEN as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}); "
            "is the download complete? Take an undamaged copy"
        ) from error


class _Bounded(gguf.GGUFReader):
    """Ends where the file ends; the package itself reads on, and finds arrays without content."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        # A slice of the plain array costs half of a memmap's, and headers have hundred thousands.
        self.data = np.asarray(self.data)  # type: ignore[assignment]
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise EOFError("the file ends before what its header tells of")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            items = int(self._get(orig_offs + 4, np.uint64)[0])
            if items > MOST_ITEMS:
                raise ValueError(f"an array of {items:,} values in its header")
        return super()._get_field_parts(orig_offs, raw_type)


@dataclass(frozen=True)
class GgufFile:
    """Header and tensors of a whole file.

    Attributes:
        path: where it lies.
        reader: what the gguf package makes of it.
    """

    path: Path
    reader: Any

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header; of tensors, where they lie.

        Raises:
            CheckpointError: no GGUF file, a damaged or a truncated one.
            UnsupportedModelError: a part of a model, something that belongs to one, or a file of
                a machine with another order of bytes.
        """
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(
                    f"{path} is no GGUF file: it does not begin with the word GGUF; "
                    "take an undamaged copy"
                )
        with sound(path), np.errstate(over="raise"):
            found = cls(path, _Bounded(path))
            for field in found.reader.fields.values():
                field.contents()  # texts that are no UTF-8 show now
        found._check_whole()
        return found

    def _check_whole(self) -> None:
        kind = self.field("general.type", "model")
        if kind != "model":
            raise UnsupportedModelError(
                f"{self.path} holds no model but a {kind} (general.type), which belongs to one; "
                "give the file of the model"
            )
        parts = self.field("split.count", 0)
        if parts and parts != 1:
            raise UnsupportedModelError(
                f"{self.path} is one of {parts} parts; join them first: "
                "llama-gguf-split --merge FIRST_PART WHOLE"
            )
        if self.reader.byte_order != "I":
            raise UnsupportedModelError(
                f"{self.path} is of a machine with another order of bytes; convert it on this one"
            )

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the header, under its full name."""
        fields = self.reader.fields
        return fields[name].contents() if name in fields else default

    @cached_property
    def architecture(self) -> str:
        return str(self.field("general.architecture"))

    def setting(self, name: str, default: Any = None) -> Any:
        """A value below the architecture, the same for all layers; reals to the last digit that
        float32 has.

        Raises:
            CheckpointError: neither there nor a default.
            UnsupportedModelError: layers differ in it.
        """
        whole = f"{self.architecture}.{name}"
        value = self.field(whole, default)
        if value is None:
            raise CheckpointError(f"{self.path} does not say {whole}; convert the model again")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{self.path} has layers of different {name}; dotexport narrows decoders of "
                    "equal layers"
                )
            value = value[0]
        return shortest(value) if isinstance(value, float) else value

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        """Name -> what the gguf package knows of it."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """As torch has it, the last axis contiguous."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, dequantised to float32.

        Raises:
            UnsupportedModelError: stored in a way that the gguf package does not read.
            CheckpointError: it holds NaN or infinite values.
        """
        stored = self.tensors[name]
        try:
            with np.errstate(all="ignore"):
                values = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{name} in {self.path} is stored as {stored.tensor_type.name}, which the gguf "
                "package cannot read; take the file in another quantisation, such as Q8_0"
            ) from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the map ends
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} in {self.path} holds NaN or infinite values; take an undamaged copy"
            )
        return tensor


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in float32, in which headers store reals.

    >>> shortest(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))
