"""Which files of a folder are its weights, and which of them holds each tensor.

transformers decides: `model.safetensors` before an index; every tensor of every shard that the
index names, whatever the index says of where it is. A folder that holds two answers which differ is
refused, because other readers take the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dotexport.errors import CheckpointError
from dotexport.models.config_words import say_once
from dotexport.storage.reading import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "expected a weight_map from tensor names to files in this folder: download it again"
PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt")
ROWS = 16384  # of two tensors that are compared: as a whole they may not fit


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it.

    Raises:
        CheckpointError: a missing shard, a broken file, or two sets of weights that differ.
    """
    files = _weight_files(folder)
    places = _places(files)
    index = folder / INDEX
    if files == [folder / WEIGHTS] and index.is_file():
        _check_beside(places, index)
    return places


def has_weights(folder: Path) -> bool:
    """Whether all files are here: sizes are planned from a config.json alone."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return True
    return index.is_file() and all(file.is_file() for file in _shard_files(index))


def same_values(name: str, file: Path, other_name: str, other_file: Path) -> bool:
    """Whether two tensors are equal, whatever they are stored as."""
    with opened(file) as left, opened(other_file) as right:
        here, there = left.get_slice(name), right.get_slice(other_name)
        shape = here.get_shape()
        if shape != there.get_shape():
            return False
        if not shape:
            return bool(left.get_tensor(name) == right.get_tensor(other_name))
        starts = range(0, shape[0], ROWS)
        rows = ((here[n : n + ROWS], there[n : n + ROWS]) for n in starts)
        return all(bool(torch.equal(a.double(), b.double())) for a, b in rows)


def _weight_files(folder: Path) -> list[Path]:
    index, whole = folder / INDEX, folder / WEIGHTS
    shards = _shard_files(index) if index.is_file() else [whole]
    files = [whole] if whole.is_file() else shards
    missing = [file.name for file in files if not file.is_file()]
    pickled = sorted(file.name for glob in PICKLED for file in folder.glob(glob))
    if missing and pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickled[0]}) and no safetensors; convert it first "
            "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)} ({len(missing)} of {len(files)} weight files); "
            "download the model again or point to a complete folder"
        )
    return files


def _shard_files(index: Path) -> list[Path]:
    try:
        stored = read_json(index, advice=AGAIN)
        names = set(stored["weight_map"].values())
        wrong = sorted(str(name) for name in names if not _is_below(name))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    if wrong or not names:
        found = f"{wrong[0]!r} is no file of this folder" if wrong else "no file is named"
        raise CheckpointError(f"{index}: {found}; {AGAIN}")
    return sorted(index.parent / name for name in names)


def _is_below(name: object) -> bool:
    path = PurePosixPath(name) if isinstance(name, str) and "\0" not in name else None
    return bool(path and path.parts and not path.is_absolute() and ".." not in path.parts)


def _places(files: Sequence[Path]) -> dict[str, Path]:
    """Raises CheckpointError where two files hold a tensor with different values."""
    places: dict[str, Path] = {}
    for file in files:
        for name in _tensor_names(file):
            if name in places and not same_values(name, places[name], name, file):
                raise CheckpointError(
                    f"{name} is in {places[name]} and, with other values, in {file.name}; keep "
                    "the shards of one model, and download them again if you are not sure"
                )
            places[name] = file  # as transformers: the last one
    return places


def _check_beside(whole: dict[str, Path], index: Path) -> None:
    """Refuse shards that are another model than the whole file beside them."""
    shards = _shard_files(index)
    folder = index.parent
    if set(shards) <= {folder / WEIGHTS}:
        return
    if not all(file.is_file() for file in shards):
        say_once(f"{folder}: {WEIGHTS} is read, as transformers does; {INDEX} names files not here")
        return
    places = _places(shards)
    wrong = sorted(whole.keys() ^ places.keys())
    both = sorted(whole.keys() & places.keys())
    wrong += [name for name in both if not same_values(name, whole[name], name, places[name])]
    if wrong:
        raise CheckpointError(
            f"{folder} holds two models: {WEIGHTS} and the shards of {INDEX} differ in "
            f"{len(wrong)} tensors, first {wrong[0]}; remove one of the two (transformers reads "
            f"{WEIGHTS})"
        )
    say_once(f"{folder}: {WEIGHTS} is read, as transformers does; the shards beside it are equal")


def _tensor_names(file: Path) -> list[str]:
    with opened(file) as weights:
        return list(weights.keys())


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors handle whose errors name the file and say what to do."""
    try:
        handle: Any = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is truncated or damaged: "
            "download it again"
        ) from error
    with handle:
        yield handle
