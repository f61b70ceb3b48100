"""The rejoin verb: the towers of a model that sees or hears, around its narrowed language model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dotexport.axes.plan import read_model
from dotexport.errors import CheckpointError, SizeError, UnsupportedModelError, UsageError
from dotexport.exports.exporting import Artifact
from dotexport.exports.kept_reference import reference_of
from dotexport.exports.parity import Parity
from dotexport.exports.target import find_target
from dotexport.exports.verifying import STOCK, check, require, with_text, write_report
from dotexport.models.checkpoint import TABLE, Checkpoint, check_inside, shard_name, stored_config
from dotexport.models.multimodal import PROCESSORS, is_multimodal, joined_config, stored_name
from dotexport.models.origin import describe_source
from dotexport.models.weight_files import INDEX, opened, tensor_files
from dotexport.sizes.beside_towers import STREAM
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
    """Write FOLDER/hf: MODEL again, with OUT/hf in the place of its language model, held against
    torch. FOLDER is an output like those of `export`.

    Every other tensor stays as it is, but heads for further tokens, which fit the original alone.
    What does not compute OUT/hf's logits of text is not kept.

    Args:
        model: what OUT was narrowed from.

    Raises:
        CheckpointError: OUT came from another model.
        UnsupportedModelError: MODEL is a language model and nothing else.
        SizeError: the towers write a stream, or know tokens, that are no longer there.
        UsageError: FOLDER lies in OUT or in MODEL, or holds one of them.
        ParityError: what was written computes something else.
    """
    said = stored_config(model)
    if not is_multimodal(said):
        raise UnsupportedModelError(
            f"{model} has no towers that could be put back: its config.json is that of a "
            f"{said.get('model_type')!r} alone; {out / STOCK} is the whole of what came out of it"
        )
    original, narrowed = Checkpoint.open(model), Checkpoint.open(out / STOCK)
    source = describe_source(original)
    if source["sha256"] != manifest.read(out)["source"]["sha256"]:
        raise CheckpointError(
            f"{out} was not made from {model}: its manifest has other hashes of the original's "
            "files; give the folder that it was made from"
        )
    _check_widths(original, narrowed)
    _check_apart(folder, out, model)
    processors = [file for glob in PROCESSORS for file in sorted(model.glob(glob))]
    for file in processors:
        check_inside(file)
    parts = _parts(original, narrowed)
    with new_folder(folder, overwrite=overwrite) as partial:
        place = partial / STOCK
        place.mkdir()
        _write(parts, place, progress)
        write_json(place / "config.json", joined_config(said, narrowed.config))
        for file in (*narrowed.companions(), *processors):
            shutil.copyfile(file, place / file.name)
        progress("holding it against torch", len(parts), len(parts) + 1)
        target, precision = find_target(STOCK), "as-stored"
        reference = reference_of(out, rounded=False, precisions={precision})
        parity = check(target, precision, place, reference, artifact=STOCK)
        parity = with_text(parity, target, place, narrowed)
        require([parity], note="; it is not kept")
        write_report(partial, [parity], reference)
        files = manifest.hash_files(place)
        artifact = Artifact(STOCK, precision, place, files, parity)
        manifest.update(
            partial,
            source=source,
            artifacts={STOCK: artifact.entry},
            environment=manifest.environment(),
        )
    return parity


def _check_apart(folder: Path, out: Path, model: Path) -> None:
    place = folder.expanduser().resolve()
    for other in (out.resolve(), model.resolve()):
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise UsageError(
                f"{folder} lies in {other}, or holds it; give the whole a folder apart from both"
            )


def _check_widths(original: Checkpoint, narrowed: Checkpoint) -> None:
    before, after = (read_model(one.config)[1] for one in (original, narrowed))
    was, now = STREAM.size(before), STREAM.size(after)
    if was != now:
        raise SizeError(
            f"{narrowed.folder} has {STREAM.name} {now}, and the projector writes a stream of "
            f"{was}; narrow other axes (a budget leaves this one alone unless --axes or "
            f"--{STREAM.flag} names it)"
        )
    if before.vocab_size != after.vocab_size:
        raise SizeError(
            f"{narrowed.folder} has {after.vocab_size} tokens, and the whole has a tokenizer of "
            f"{before.vocab_size}, with words for pictures; leave out --vocab and --vocab-for"
        )


def _parts(original: Checkpoint, narrowed: Checkpoint) -> list[dict[str, Place]]:
    """What goes into each file: the language model as OUT has it, then what lies around it."""
    family, table = read_model(original.config)[0], original.stored[TABLE]
    unread = family.unread(original.config) if family.unread else ()
    parts: dict[Path, dict[str, Place]] = {}
    for name, file in tensor_files(narrowed.folder).items():
        parts.setdefault(file, {})[stored_name(name, table)] = Place(file, name)
    language = set(original.stored.values())
    passed_over = (*family.left_out, *(stored_name(start, table) for start in unread))
    for name, file in tensor_files(original.folder).items():
        if name not in language and not name.startswith(passed_over):
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
