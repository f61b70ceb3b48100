"""Pipeline folders: what is carried over, and the two forms in which a pruned denoiser is saved.

Stock form: where the class has a config entry for the width of all feed-forward layers and only
they were cut, evenly, the folder loads with diffusers alone. Else the denoiser is of the class
`Pruned...` of carrier.py, which stock diffusers refuses by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from dotexport.diffusion.sampling import INDEX, quiet
from dotexport.diffusion.tables import find_sites, find_table
from dotexport.errors import UsageError
from dotexport.models.origin import licence, model_name
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.reading import read_json

FOLDER = "pipeline"
STANDALONE = "pruned.py"
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack"}


def pipeline_of(folder: Path) -> Path:
    """The pipeline in a folder: itself, or the one that an output of dotexport holds."""
    inside = folder / FOLDER
    return inside if (inside / INDEX).is_file() else folder


def check_apart(folder: Path, out: Path) -> None:
    """Refuse an output that would replace the pipeline it comes from."""
    if folder.resolve().is_relative_to(out.expanduser().resolve()):
        raise UsageError(
            f"the pipeline {folder} lies inside the output {out}, which would replace it; "
            "give another output folder"
        )


def weight_files(folder: Path) -> list[Path]:
    """Weight files of one component."""
    return sorted(folder.glob("*.safetensors"))


def describe_source(folder: Path, component: str) -> dict[str, Any]:
    """What the manifest says about the pipeline that went in; no path of the user's machine."""
    files = [folder / INDEX, folder / component / "config.json", *weight_files(folder / component)]
    return {
        "model": model_name(folder),
        "licence": licence(folder),
        "bytes": sum(file.stat().st_size for file in weight_files(folder / component)),
        "sha256": {file.relative_to(folder).as_posix(): manifest.sha256(file) for file in files},
    }


def artifact(folder: Path) -> dict[str, Any]:
    """The pipeline as an entry of the manifest's artifacts."""
    files = manifest.hash_files(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    stored = {"target": "pipeline", "precision": "as-stored", "bytes": num_bytes}
    return stored | {"files": files, "parity": None}


def save(
    model: nn.Module,
    component: str,
    layout: Sequence[dict[str, Any]],
    source: Path,
    folder: Path,
) -> str:
    """Write a pipeline folder with this denoiser and everything else of `source`; its class."""
    from dotexport.diffusion import carrier  # needs diffusers

    _carry_over(source, component, folder)
    stored = _stored_dtype(source / component)
    to_save: Any = model
    if stored is not None and stored != next(model.parameters()).dtype:
        to_save = model.to(dtype=stored)
    if layout and not _fits_stock(to_save, layout):
        stock = next(
            base for base in type(model).__mro__ if base.__module__.startswith("diffusers")
        )
        to_save.__class__ = carrier.pruned_class(stock.__name__)
        to_save.register_to_config(pruned_layout=list(layout))
    with quiet():
        to_save.save_pretrained(folder / component, safe_serialization=True)
    name = type(to_save).__name__
    config = read_json(folder / component / "config.json", advice="save the pipeline again")
    config.pop("_name_or_path", None)  # a path of this machine
    if "pruned_layout" in config:
        config["auto_map"] = {"AutoModel": f"{STANDALONE.removesuffix('.py')}.{name}"}
        _name_the_class(folder, component, name)
    write_json(folder / component / "config.json", config)
    return name


def _name_the_class(folder: Path, component: str, name: str) -> None:
    """Say where the class lives: for pipelines, and beside the weights for AutoModel."""
    from dotexport.diffusion import carrier

    index = read_json(folder / INDEX, advice="save the pipeline again")
    index[component] = [carrier.__name__, name]
    write_json(folder / INDEX, index)
    shutil.copyfile(carrier.__file__, folder / component / STANDALONE)


def _carry_over(source: Path, component: str, folder: Path) -> None:
    """Copy all but the denoiser; pickles stay behind."""

    def skipped(place: str, names: list[str]) -> set[str]:
        ours = {component} if Path(place) == source else set()
        return ignore_pickles(place, names) | ours

    shutil.copytree(source, folder, ignore=skipped)


def ignore_pickles(place: str, names: list[str]) -> set[str]:
    """For `copytree`: what stays behind."""
    return {name for name in names if Path(name).suffix in PICKLES}


def _stored_dtype(folder: Path) -> Any:
    """The dtype of most weights in a component; None if it has no safetensors."""
    import torch

    counts: dict[str, int] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  not a dict
                dtype = opened.get_slice(key).get_dtype()
                counts[dtype] = counts.get(dtype, 0) + 1
    named = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    return named.get(max(counts, key=lambda key: counts[key])) if counts else None


def _fits_stock(model: Any, layout: Sequence[dict[str, Any]]) -> bool:
    """Write the new width into the stock config, if that says all that changed."""
    table, sites = find_table(model), find_sites(model)
    found = {site.units for site in sites if site.kind == "ffn"}
    ours = {name for site in sites for name in (*site.readers, *site.writers, site.name)}
    only_ffn = all(entry["module"] in ours and "heads" not in entry for entry in layout)
    if table.field is None or len(found) != 1 or not only_ffn:
        return False
    (width,) = found
    value: float = width
    if table.per is not None:
        value = _ratio(width, int(model.config[table.per]))
    model.register_to_config(**{table.field: value})
    return True


def _ratio(width: int, base: int) -> float:
    """The number that times `base`, rounded down, is `width`."""
    ratio = width / base
    return ratio if int(base * ratio) == width else (width + 0.5) / base
