"""The shrink verb: a model folder goes in, OUT/hf of the same stock class comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dotexport import card, manifest
from dotexport.calibrate import TextOptions, token_windows
from dotexport.checkpoint import Checkpoint, CheckpointWriter, TensorSpec, find_model
from dotexport.errors import (
    CheckpointError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from dotexport.families import Family, Sizes, check_quantised, check_shapes, shapes
from dotexport.heal import HealOptions, heal_into, healing_text, workspace_of
from dotexport.layers import Stock
from dotexport.narrow import Narrowing, Progress
from dotexport.origin import describe_source
from dotexport.output import new_folder, write_json, write_text
from dotexport.resume import ClosedForm, Workspace, settle_others
from dotexport.site import NarrowOptions
from dotexport.sizing import Plan, plan
from dotexport.streams import Streams

RECIPE = "recipe.yaml"


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions:
    """How narrow, and how.

    Attributes:
        hidden_size, intermediate_size: explicit sizes; None leaves the axis to `params`, or as is.
        params: budget such as `0.7x`.
        text: calibration text.
        narrow: methods.
        heal: distillation after the closed form; None: none.
        max_shard_bytes: largest weight file.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    params: str | None = None
    text: TextOptions
    narrow: NarrowOptions = field(default_factory=NarrowOptions)
    heal: HealOptions | None = None
    max_shard_bytes: int = 4 << 30


@dataclass(frozen=True)
class Shrunk:
    """What shrink made."""

    out: Path
    plan: Plan
    basis: str
    kept_energy: float
    seconds: float
    num_windows: int
    sites: list[dict[str, Any]]
    healing: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "sizes": self.plan.as_dict(),
            "basis": {"method": self.basis, "kept_energy": self.kept_energy},
            "seconds": round(self.seconds, 2),
            "calibration_windows": self.num_windows,
            "sites": self.sites,
            **({"healing": self.healing} if self.healing else {}),
        }


def shrink(
    model: str | Path,
    out: Path,
    options: ShrinkOptions,
    *,
    overwrite: bool = False,
    device: str = "auto",
    recipe: str = "",
    progress: Progress = lambda stage, done, total: None,
) -> Shrunk:
    """Narrow a model and write OUT/hf, OUT/dotexport.json, OUT/README.md and OUT/reports.

    Two runs with the same inputs, options and machine give the same bytes in OUT/hf. A run with
    healing that was stopped goes on where it was (resume.py).

    Args:
        recipe: what OUT/recipe.yaml will say; it appears with the rest, so that a run which is
            killed right afterwards is known again.

    Raises:
        CheckpointError, CalibrationError, UnsupportedModelError, SizeError, UsageError.
    """
    started = time.perf_counter()
    source = open_source(find_model(str(model)))
    decided = plan(
        source.config,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        params=options.params,
    )
    _check_tensors(source, decided.family, decided.before)
    _check_apart(source.folder, out)
    with new_folder(out, overwrite=overwrite) as folder:
        progress("reading the calibration text", 0, 1)
        windows_NL = token_windows(source.folder, options.text)
        _warn_if_thin(windows_NL, decided)
        closed, healing, workspace = _narrowed(
            source, decided, out, folder, windows_NL, options, device, overwrite, progress
        )
        _copy_companions(source, folder / "hf")
        seconds = time.perf_counter() - started
        shrunk = Shrunk(
            out,
            decided,
            closed.basis["method"],
            closed.basis["kept_energy"],
            seconds,
            len(windows_NL),
            closed.sites,
            healing,
        )
        if recipe:
            write_text(folder / RECIPE, recipe)
            manifest.update(folder, recipe=hashlib.sha256(recipe.encode()).hexdigest())
        _describe(folder, source, options, shrunk, windows_NL, closed)
    if workspace:
        workspace.remove()
    return shrunk


def _narrowed(
    source: Checkpoint,
    decided: Plan,
    out: Path,
    folder: Path,
    windows_NL: torch.Tensor,
    options: ShrinkOptions,
    device: str,
    overwrite: bool,
    progress: Progress,
) -> tuple[ClosedForm, dict[str, Any] | None, Workspace | None]:
    """Write FOLDER/hf: the closed form, or what an earlier run left of it, and healing."""
    if options.heal is None:
        settle_others(out, None, overwrite=overwrite)
        closed = _closed_form(source, decided, folder, windows_NL, options, device, progress)
        return closed, None, None
    where = pick_device(device)
    text = healing_text(
        windows_NL, source.folder, options.text, options.heal, seed=options.narrow.seed
    )
    workspace = workspace_of(out, source, asdict(options), text, where)
    settle_others(out, workspace, overwrite=overwrite)
    found = workspace.closed_form(folder / "hf")
    closed = found or _closed_form(source, decided, folder, windows_NL, options, device, progress)
    if found is None:
        workspace.keep_closed_form(closed, folder / "hf")
    writer = partial(
        CheckpointWriter,
        folder / "hf",
        _specs(source, decided),
        max_shard_bytes=options.max_shard_bytes,
    )
    report = heal_into(
        folder / "hf", source, closed, text, options.heal, writer, workspace, where, progress
    )
    return closed, report, workspace


def _closed_form(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    windows_NL: torch.Tensor,
    options: ShrinkOptions,
    device: str,
    progress: Progress,
) -> ClosedForm:
    (folder / "hf").mkdir()
    run = prepare(source, decided, folder, windows_NL, options, device, progress)
    with torch.inference_mode():
        basis = run.run()
    run.writer.finish()
    E_DK = torch.from_numpy(basis.matrix_DK)
    return ClosedForm(E_DK, basis.as_dict(), run.records, str(run.streams.device))


def _warn_if_thin(windows_NL: torch.Tensor, decided: Plan) -> None:
    """Say when there is less text than a least-squares problem of this size asks for."""
    tokens, widest = (
        windows_NL.numel(),
        max(decided.before.hidden_size, decided.after.intermediate_size),
    )
    if len(windows_NL) < 2 or tokens < 4 * widest:
        logger.warning(
            "only %d windows with %d tokens of calibration text for layers up to %d wide; "
            "more text or --samples makes a better model",
            len(windows_NL),
            tokens,
            widest,
        )


def open_source(folder: Path) -> Checkpoint:
    """A model that can be narrowed, or the reason why it cannot.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    if not (folder / "config.json").is_file() and (library := library_of(folder)):
        raise UnsupportedModelError(
            f"{folder} is a model of the library {library}; this verb narrows decoder LLMs of "
            "transformers (config.json and *.safetensors)"
        )
    checkpoint = Checkpoint.open(folder)
    check_quantised(checkpoint.config)
    return checkpoint


def library_of(folder: Path) -> str | None:
    """The library that a folder without config.json belongs to, if Optimum knows it."""
    from optimum.exporters.tasks import TasksManager

    try:
        return str(TasksManager.infer_library_from_model(str(folder)))
    except ValueError:
        return None


def _check_tensors(source: Checkpoint, family: Family, sizes: Sizes) -> None:
    found = {name: spec.shape for name, spec in source.specs.items()}
    check_shapes(family, sizes, found, source.folder)
    expected = {name for name, _ in shapes(family, sizes)}
    # Old Llama files store rotary frequencies, and some tied ones the shared table twice.
    harmless = (".rotary_emb.inv_freq", f"{family.head.name}.weight")
    foreign = [n for n in found if n not in expected and not n.endswith(harmless)]
    if foreign:
        raise CheckpointError(
            f"{source.folder} holds tensors that {family.architecture} has no place for "
            f"({len(foreign)}, first {foreign[0]}); merge adapters into the model first, or take "
            "the config.json that belongs to these weights"
        )


def _check_apart(model: Path, out: Path) -> None:
    if model.resolve().is_relative_to(out.expanduser().resolve()):
        raise UsageError(
            f"the model {model} lies inside the output {out}, which would replace it; "
            "give another output folder"
        )


def prepare(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    windows_NL: torch.Tensor,
    options: ShrinkOptions,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> Narrowing:
    """Everything a run needs, with config.json and empty weight files already in FOLDER/hf."""
    config = narrowed_config(source.config, decided)
    write_json(folder / "hf" / "config.json", config)
    specs = _specs(source, decided)
    where = pick_device(device)
    streams = Streams.allocate(
        windows_NL,
        decided.before.hidden_size,
        decided.after.hidden_size,
        seed=options.narrow.seed,
        device=where,
        scratch=folder,
    )
    return Narrowing(
        source,
        decided.family,
        decided.before,
        decided.after,
        Stock.of(source.config, where),
        Stock.of(config, where),
        streams,
        CheckpointWriter(folder / "hf", specs, max_shard_bytes=options.max_shard_bytes),
        options.narrow,
        progress,
    )


def pick_device(name: str) -> torch.device:
    """The device of `--device`; auto is cuda where there is one.

    Raises:
        UsageError: no name of a device.
        RuntimeMissingError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name} is not known; expected auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeMissingError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use "
            "--device cpu, or install a torch built for your GPU"
        )
    return device


def narrowed_config(config: Mapping[str, Any], decided: Plan) -> dict[str, Any]:
    """config.json of the narrower model: the same keys, other numbers.

    head_dim is explicit because hidden_size / heads no longer gives it; rms_norm_eps is rescaled by
    D / K, which together with sqrt(D / K) in the readers makes the narrower norm exact.
    """
    before, after = decided.before, decided.after
    changed = dict(config)
    changed["hidden_size"] = after.hidden_size
    changed["intermediate_size"] = after.intermediate_size
    changed["head_dim"] = after.head_dim
    changed["tie_word_embeddings"] = after.tied
    if after.hidden_size != before.hidden_size:
        epsilon = config.get("rms_norm_eps", 1e-6)
        changed["rms_norm_eps"] = epsilon * before.hidden_size / after.hidden_size
    changed.pop("_name_or_path", None)
    return changed


def _specs(source: Checkpoint, decided: Plan) -> dict[str, TensorSpec]:
    family = decided.family
    stored = source.specs
    table = stored[f"{family.embedding}.weight"].dtype
    return {
        name: TensorSpec(shape, stored[name].dtype if name in stored else table)
        for name, shape in shapes(family, decided.after)
    }


def _artifact(folder: Path) -> dict[str, Any]:
    """The stock checkpoint is an artifact too, of the target `hf`."""
    files = manifest.hash_files(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    stored = {"target": "hf", "precision": "as-stored", "bytes": num_bytes}
    return stored | {"files": files, "parity": None}


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    for file in source.companions():
        shutil.copyfile(file, folder / file.name)


def _describe(
    folder: Path,
    source: Checkpoint,
    options: ShrinkOptions,
    shrunk: Shrunk,
    windows_NL: torch.Tensor,
    closed: ClosedForm,
) -> None:
    recipe = json.loads(json.dumps(asdict(options)))
    manifest.update(
        folder,
        source=describe_source(source),
        shrink=recipe | {"sha256": hashlib.sha256(json.dumps(recipe).encode()).hexdigest()},
        calibration={
            "source": options.text.source,
            "windows": len(windows_NL),
            "seqlen": windows_NL.shape[1],
            "sha256": hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest(),
        },
        sizes=shrunk.plan.as_dict(),
        basis=closed.basis,
        artifacts={"hf": _artifact(folder / "hf")},
        timings={"shrink_seconds": round(shrunk.seconds, 2)},
        environment=manifest.environment() | {"device": closed.device},
        **({"healing": shrunk.healing} if shrunk.healing else {}),
    )
    write_json(folder / "reports" / "shrink.json", shrunk.as_dict())
    card.write(folder)
