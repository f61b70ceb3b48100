"""Folders of encoders: opened with the stock class, and written with everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dotexport.encoders.kinds import (
    MODULES,
    PERIOD,
    STOCK,
    TYPES,
    Kind,
    class_of,
    kind_of,
    layer_types,
    of_layers,
    transformer_of,
)
from dotexport.errors import CheckpointError, UnsupportedModelError, UsageError
from dotexport.models.checkpoint import all_finite
from dotexport.models.origin import licence, model_name
from dotexport.models.quiet import quiet
from dotexport.models.weight_files import tensor_files
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx"),
    "model.safetensors.index.json",
)
BESIDE = (MODULES, "*/config.json", "*/*.safetensors")
"""Modules of sentence-transformers."""
LEFT = ("README.md", ".*", "onnx", "openvino")
"""What is not carried over: the card of the original, hidden files, the model in other forms; and
its weights, where config.json lies. Other modules of sentence-transformers keep theirs."""


@dataclass(frozen=True)
class Encoder:
    """A stock model in evaluation, float32.

    Attributes:
        root: the folder; of sentence-transformers the one with modules.json.
        home: where config.json lies, `root` or below it.
        config: config.json as it is written.
        dtype: what most of its weights are stored in.
        names: tensors that the file holds.
    """

    root: Path
    home: Path
    config: Mapping[str, Any]
    kind: Kind
    model: nn.Module
    dtype: torch.dtype
    names: frozenset[str]

    @cached_property
    def programs(self) -> dict[tuple[bool, bool], Any]:
        """What was traced of it (EncoderGraph.program): precisions and targets share it."""
        return {}

    @property
    def base(self) -> nn.Module:
        base: nn.Module = self.model.base_model  # type: ignore[assignment]
        return base

    @property
    def num_tokens(self) -> int:
        """Rows of its embedding."""
        return rows_of(self.model)

    @property
    def hidden_size(self) -> int:
        """Width of its stream."""
        writer: Any = self.layers[0].get_submodule(self.kind.writer)
        return int(writer.out_features)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.get_submodule(self.kind.stack)  # type: ignore[return-value]


def rows_of(model: nn.Module) -> int:
    """Tokens that its embedding has rows for."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(table.num_embeddings)


def layers_of(model: nn.Module, kind: Kind) -> nn.ModuleList:
    """The stack of a stock model of this kind."""
    base: Any = model.base_model
    layers: nn.ModuleList = base.get_submodule(kind.stack)
    return layers


def open_encoder(folder: Path) -> Encoder:
    """An encoder with its weights.

    Raises:
        CheckpointError: weights that are missing, damaged or of another class.
        UnsupportedModelError: a class that is not known here.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    root = folder / STOCK if (folder / STOCK).is_dir() else folder
    home = transformer_of(folder)
    config = read_json(home / "config.json", advice="take a fresh copy", finite=True)
    kind, name = kind_of(config), class_of(config)
    if kind.alternates:
        said, derived = layer_types(config), layer_types({**config, TYPES: None})
        if said != derived and not _reads_types(config):
            raise UnsupportedModelError(
                f"{home} says with {TYPES} which layers see all of the text, and transformers "
                f"{transformers.__version__} reads {PERIOD} alone; take 5.0 or newer"
            )
    tensor_files(home)  # says what is wrong with the weight files
    try:
        with quiet():
            model, found = getattr(transformers, name).from_pretrained(
                home, dtype="auto", output_loading_info=True, attn_implementation="eager"
            )
    except (ValueError, TypeError, RuntimeError, LookupError, StrictDataclassError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{home} does not load as {name} ({first}); take the config.json that belongs to "
            "these weights"
        ) from error
    missing = {key for key in found["missing_keys"] if "pooler." not in key}
    if missing or found["mismatched_keys"]:
        first = sorted(map(str, missing or found["mismatched_keys"]))[0]
        raise CheckpointError(
            f"{home} has no fitting tensor for {first} of {name}; is the download complete?"
        )
    dtype = model.dtype
    model = model.float().eval()
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and not all_finite(value):
            raise CheckpointError(
                f"{key} in {home} holds NaN or infinite values; take another copy"
            )
    names = frozenset(state) - set(found["missing_keys"])
    return Encoder(root, home, config, kind, model, dtype, names)


def can_hold(config: Mapping[str, Any], kept: Sequence[int]) -> bool:
    """Whether the stock class, as it is installed, can say of these layers which of them see all
    of the text: before transformers 5 that was every n-th."""
    periodic = of_layers(config, kept).get(PERIOD, 1) is not None
    return periodic or _reads_types(config)


def _reads_types(config: Mapping[str, Any]) -> bool:
    from transformers import AutoConfig

    return hasattr(AutoConfig.for_model(config["model_type"]), TYPES)


def copy_beside(encoder: Encoder, folder: Path) -> None:
    """Copy everything but the weights and what belongs to the original alone."""

    def left(place: str, names: list[str]) -> set[str]:
        own = WEIGHTS if Path(place) == encoder.home else ()
        return shutil.ignore_patterns(*LEFT, *own)(place, names)

    shutil.copytree(encoder.root, folder, ignore=left, dirs_exist_ok=True)


def save_encoder(encoder: Encoder, model: nn.Module, folder: Path) -> None:
    """Write a folder like the original's around another model of its class; words of sizes in
    config.json are those of the model."""

    copy_beside(encoder, folder)
    home = folder / encoder.home.relative_to(encoder.root)
    config = dict(encoder.config)
    known = vars(model.config)
    config |= {word: known[word] for word in encoder.kind.sizes if word in known}
    state = {
        key: value.to(encoder.dtype) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if _old_name(key, encoder) in encoder.names
    }
    model.to(encoder.dtype)
    with quiet():
        model.save_pretrained(home, state_dict=state)  # type: ignore[operator]
    model.float()
    write_json(home / "config.json", config)


def _old_name(key: str, encoder: Encoder) -> str:
    """Every layer behind the first has the tensors of the second; the first always stays."""
    before, stack, after = key.partition(f"{encoder.kind.stack}.")
    number, _, name = after.partition(".")
    return f"{before}{stack}{min(int(number), 1)}.{name}" if stack else key


def describe_source(encoder: Encoder) -> dict[str, Any]:
    """What the manifest says about the model that went in."""
    own = {*tensor_files(encoder.home).values(), encoder.home / "config.json"}
    files = sorted({*own, *_modules(encoder.root)})
    return {
        "model": model_name(encoder.root),
        "licence": licence(encoder.root),
        "bytes": sum(file.stat().st_size for file in files if file.suffix != ".json"),
        "sha256": {f.relative_to(encoder.root).as_posix(): manifest.sha256(f) for f in files},
    }


def _modules(root: Path) -> Iterator[Path]:
    """What sentence-transformers computes with besides."""
    if (root / MODULES).is_file():
        for file in chain.from_iterable(map(root.glob, BESIDE)):
            if not any(fnmatch(file.relative_to(root).parts[0], pattern) for pattern in LEFT):
                yield file


def artifact(folder: Path, target: str, precision: str) -> dict[str, Any]:
    """A folder as an entry of the manifest's artifacts."""
    files = manifest.hash_files(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    return {
        "target": target,
        "precision": precision,
        "bytes": num_bytes,
        "files": files,
        "parity": None,
    }


def check_apart(folder: Path, out: Path) -> None:
    """Refuse an output that would replace the model it comes from."""
    if folder.resolve().is_relative_to(out.expanduser().resolve()):
        raise UsageError(
            f"the model {folder} lies inside the output {out}, which would replace it; "
            "give another output folder"
        )
