"""A GGUF file as a model folder: unpacked once, into the user's cache, under the file's hash.

Every verb goes on with that folder. Weights lie there as they are in the file where that is F32,
F16 or BF16, and dequantised to float32 where it is not, which loses nothing; one tensor is in
memory at a time. The folder says which file it is of, and so do manifests and cards of what is
made from it.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dotexport.errors import CheckpointError, RuntimeMissingError, UsageError
from dotexport.models.checkpoint import DTYPE_CODES, CheckpointWriter, TensorSpec
from dotexport.models.origin import ORIGIN
from dotexport.storage.files import write_json, write_text
from dotexport.storage.locking import locked
from dotexport.storage.manifest import sha256
from dotexport.storage.output import new_folder

if TYPE_CHECKING:
    from dotexport.models.ggml.ggml_model import GgufModel

logger = logging.getLogger(__name__)

SUFFIX, MAGIC = ".gguf", b"GGUF"
KEY_DIGITS = 16


def is_gguf(path: Path) -> bool:
    """Whether this is a file that says, by name or content, that it is GGUF."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dotexport/gguf, or ~/.cache/dotexport/gguf."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dotexport/gguf"


def unpacked(path: Path, *, config_only: bool = False) -> Path:
    """The model folder of a GGUF file, made where it is not there yet.

    Args:
        config_only: without weights.

    Raises:
        RuntimeMissingError: the gguf package is not installed.
        CheckpointError: a damaged file, or no folder can be made for it.
        UnsupportedModelError: no class, or no tokenizer, that this could be unpacked as.
    """
    try:
        from dotexport.models.ggml.ggml_model import GgufModel
    except ImportError as error:
        raise RuntimeMissingError(
            f"reading {path} needs the gguf package; pip install 'dotexport[gguf]'"
        ) from error
    digest = sha256(path)
    whole = cache_folder() / digest[:KEY_DIGITS] / path.stem
    folder = cache_folder() / f"{digest[:KEY_DIGITS]}-config" / path.stem if config_only else whole
    for made in (whole, folder):
        if (made / ORIGIN).is_file():
            return made
    model = GgufModel.open(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):
            if not (folder / ORIGIN).is_file():
                with new_folder(folder) as partial:
                    _write(model, partial, digest, config_only=config_only)
    except (OSError, UsageError) as error:
        raise CheckpointError(
            f"{path} cannot be unpacked into {folder} ({error}); set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    return folder


def _write(model: GgufModel, folder: Path, digest: str, *, config_only: bool) -> None:
    from dotexport.models.ggml.ggml_file import sound
    from dotexport.models.ggml.ggml_tokenizer import ends_of, write_tokenizer

    file, config = model.file, dict(model.config)
    rows, context = config["vocab_size"], config["max_position_embeddings"]
    with sound(file.path):
        ids = write_tokenizer(file, folder, rows=rows, context=context)
    ends = ends_of(file, rows)
    stops = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    write_json(folder / "generation_config.json", {**ids, **stops})
    dtype = model.dtype()
    words = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids}
    named = {"dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", {**config, **words, **named})
    _write_card(model, folder, digest)
    if not config_only:
        specs = {name: TensorSpec(shape, dtype) for name, shape in model.shapes.items()}
        logger.warning(
            "%s is unpacked into %s: %.2f GB of %s",
            *(file.path, folder.parent, sum(s.num_bytes for s in specs.values()) / 1e9),
            DTYPE_CODES[dtype],
        )
        writer = CheckpointWriter(folder, specs)
        for name in specs:
            writer.write(name, model.tensor(name))
        writer.finish()


def _write_card(model: GgufModel, folder: Path, digest: str) -> None:
    path, licence = model.file.path, model.file.field("general.license")
    front = f"---\nlicense: {json.dumps(licence)}\n---\n\n" if isinstance(licence, str) else ""
    text = f"{front}# {path.stem}\n\nUnpacked by dotexport from {path.name}, SHA-256 {digest}.\n"
    write_text(folder / "README.md", text)
    write_json(folder / ORIGIN, {"file": path.name, "sha256": digest, "bytes": path.stat().st_size})
