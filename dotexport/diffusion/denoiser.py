"""Finished packages on disk, so that an interrupted run goes on where it was.

They lie in a hidden folder beside the output, one safetensors file per package with its records in
the header, and leave when the output is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dotexport.diffusion.tables import Site, attributes, linear


@dataclass(frozen=True)
class Stored:
    """The packages of one run; without a folder nothing is kept.

    Attributes:
        identity: hash of everything that the run depends on; other runs' packages are not taken.
    """

    folder: Path | None = None
    identity: str = ""

    @classmethod
    def beside(cls, out: Path, identity: str) -> Stored:
        """Where the packages of an output lie; those of another run are removed."""
        folder = out.resolve().parent / f".{out.name}.packages"
        stored = cls(folder, identity)
        if folder.is_dir() and not stored._ours():
            shutil.rmtree(folder)
        return stored

    def has(self, number: int) -> bool:
        return self.folder is not None and self._file(number).is_file()

    def save(
        self,
        model: nn.Module,
        number: int,
        chosen: Mapping[Site, Tensor],
        records: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep what a package changed; a file appears whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            for name in (*site.readers, *site.writers):
                for key, value in linear(model, name).state_dict().items():
                    tensors[f"{name}.{key}"] = value.contiguous()
        sizes = {
            site.name: dict(attributes(model.get_submodule(site.name), site, len(kept)))
            for site, kept in chosen.items()
        }
        header = {
            "identity": self.identity,
            "sizes": json.dumps(sizes),
            "records": json.dumps(list(records)),
        }
        partial = self._file(number).with_suffix(".partial")
        save_file(tensors or {"nothing": torch.zeros(1)}, partial, metadata=header)
        partial.replace(self._file(number))

    def load(self, model: nn.Module, number: int) -> list[dict[str, Any]]:
        """Put a package's layers into the model; its records."""
        with safe_open(self._file(number), framework="pt") as file:
            header = file.metadata()
            for key in file.keys():  # noqa: SIM118  not a dict
                if key != "nothing":
                    _put(model, key, file.get_tensor(key))
        for name, integers in json.loads(header["sizes"]).items():
            for attribute, value in integers.items():
                setattr(model.get_submodule(name), attribute, value)
        records: list[dict[str, Any]] = json.loads(header["records"])
        return records

    def clear(self) -> None:
        """The output is whole: nothing of the run has to stay."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"package-{number}.safetensors"

    def _ours(self) -> bool:
        assert self.folder is not None
        for file in self.folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                if (opened.metadata() or {}).get("identity") != self.identity:
                    return False
        return True


def _put(model: nn.Module, key: str, value: Tensor) -> None:
    name, _, parameter = key.rpartition(".")
    layer = linear(model, name)
    setattr(layer, parameter, nn.Parameter(value))
    if parameter == "weight":
        layer.out_features, layer.in_features = value.shape
