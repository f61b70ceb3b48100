"""The rejoin verb: the towers of a model that sees or hears, around its narrowed language model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dotexport.axes.plan import read_model
from dotexport.errors import CheckpointError, SizeError, UnsupportedModelError
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.parity import Parity
from dotexport.exports.target import find_target
from dotexport.exports.verifying import STOCK, check, require, with_text
from dotexport.models.checkpoint import TABLE, Checkpoint, shard_name, stored_config
from dotexport.models.multimodal import PROCESSORS, is_multimodal, joined_config, stored_name
from dotexport.models.origin import describe_source
from dotexport.models.weight_files import INDEX, opened, tensor_files
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import new_folder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a tensor is read."""

    file: Path
    name: str


def rejoin(
    out: Path,
    model: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Parity:
    """Write MODEL again with OUT/hf in the place of its language model, and hold it against torch.

    Every other tensor and file stays as it is. What does not compute OUT/hf's logits of text is not
    kept.

    Args:
        model: what OUT was narrowed from.

    Raises:
        CheckpointError: OUT came from another model.
        UnsupportedModelError: MODEL is a language model and nothing else.
        SizeError: the towers write a stream, or know tokens, that are no longer there.
        ParityError: what was written computes something else.
    """
    said = stored_config(model)
    if not is_multimodal(said):
        raise UnsupportedModelError(
            f"{model} has no towers that could be put back: its config.json is that of a "
            f"{said.get('model_type')!r} alone; {out / STOCK} is the whole of what came out of it"
        )
    original, narrowed = Checkpoint.open(model), Checkpoint.open(out / STOCK)
    if describe_source(original)["sha256"] != manifest.read(out)["source"]["sha256"]:
        raise CheckpointError(
            f"{out} was not made from {model}: its manifest has other hashes of the original's "
            "files; give the folder that it was made from"
        )
    _check_widths(original, narrowed)
    left_out = read_model(original.config)[0].left_out
    parts = _parts(original, narrowed, left_out)
    with new_folder(folder, overwrite=overwrite) as place:
        _write(parts, place, progress)
        write_json(place / "config.json", joined_config(said, narrowed.config, left_out))
        processors = [file for glob in PROCESSORS for file in sorted(model.glob(glob))]
        for file in (*narrowed.companions(), *processors):
            shutil.copyfile(file, place / file.name)
        progress("holding it against torch", len(parts), len(parts) + 1)
        target, precision = find_target(STOCK), "as-stored"
        reference = reference_of(out, rounded=False, precisions={precision})
        parity = check(target, precision, place, reference, artifact=folder.name)
        parity = with_text(parity, target, place, narrowed)
        require([parity], note="; it is not kept")
    return parity


def _check_widths(original: Checkpoint, narrowed: Checkpoint) -> None:
    before, after = (read_model(one.config)[1] for one in (original, narrowed))
    for name, why in (
        ("hidden_size", "the projector writes a stream that is"),
        ("vocab_size", "the whole has tokens for pictures, and a tokenizer,"),
    ):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            raise SizeError(
                f"{narrowed.folder} has {name} {now}, and {why} of {was}; narrow the other axes: "
                "dotexport shrink MODEL -o OUT --params 0.8x "
                "--axes intermediate_size,num_key_value_heads,num_hidden_layers"
            )


def _parts(
    original: Checkpoint, narrowed: Checkpoint, left_out: tuple[str, ...]
) -> list[dict[str, Place]]:
    """What goes into each file: the language model as OUT has it, then what lies around it."""
    language, table = set(original.stored.values()), original.stored[TABLE]
    parts: dict[Path, dict[str, Place]] = {}
    for own, file in narrowed.files.items():
        name = stored_name(own, table)
        parts.setdefault(file, {})[name] = Place(file, narrowed.stored[own])
    for name, file in tensor_files(original.folder).items():
        if name not in language and not name.startswith(left_out):
            parts.setdefault(file, {})[name] = Place(file, name)
    return list(parts.values())


def _write(parts: list[dict[str, Place]], folder: Path, progress: Progress) -> None:
    """One file of each part, and an index of all."""
    index: dict[str, str] = {}
    num_bytes = 0
    for number, part in enumerate(parts, start=1):
        progress("writing", number - 1, len(parts) + 1)
        tensors = {name: _read(place) for name, place in part.items()}
        file = shard_name(number, len(parts))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(parts) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": index})


def _read(place: Place) -> Any:
    with opened(place.file) as weights:
        return weights.get_tensor(place.name)


def as_dict(folder: Path, parity: Parity) -> Mapping[str, Any]:
    return {"folder": str(folder), "parity": parity.as_dict()}
