"""What MODEL names: a folder, a GGUF file, or a model of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from dotexport.errors import CheckpointError
from dotexport.models.checkpoint import COMPANIONS
from dotexport.models.ggml.unpacking import is_gguf, unpacked
from dotexport.models.multimodal import PROCESSORS
from dotexport.models.weight_files import INDEX


def find_model(name: str, *, config_only: bool = False, tokenizer: bool = False) -> Path:
    """A local folder, what a GGUF file unpacks to, or the snapshot of a hub id (downloaded once,
    weights as safetensors only).

    Args:
        config_only: no weights are asked for, and no tokenizer unless `tokenizer`.

    Raises:
        CheckpointError: neither a folder, a GGUF file nor a hub id that can be reached.
        RuntimeMissingError, UnsupportedModelError: a GGUF file that cannot be unpacked.
    """
    folder = Path(name).expanduser()
    if is_gguf(folder):
        return unpacked(folder, config_only=config_only)
    if folder.is_dir():
        # An output of `dotexport shrink` is a model too: its checkpoint lies in hf/.
        inner = folder / "hf"
        return inner if (inner / "config.json").is_file() else folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id (owner/name), and no GGUF file; "
            "expected a folder with config.json and *.safetensors, or a .gguf file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["config.json", "README.md"]
    wanted += [] if config_only else ["*.safetensors", INDEX, *PROCESSORS]
    wanted += COMPANIONS if tokenizer or not config_only else []
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{name} is no folder here and cannot be fetched as a hub id "
            f"({type(error).__name__}); check the spelling and the network, or give a local folder"
        ) from error


def opened(model: Path) -> Path:
    """What a GGUF file unpacks to; anything else is what it is.

    Raises:
        CheckpointError, RuntimeMissingError, UnsupportedModelError: a file that cannot be unpacked.
    """
    return unpacked(model) if is_gguf(model) else model
