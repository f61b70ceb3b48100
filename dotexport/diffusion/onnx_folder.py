"""The export and verify verbs for pipelines: ONNX graphs, each folder held against torch.

`verify` asks two things of an artifact, at two batch sizes and, where the class takes them, two
picture sizes: does one call of every component agree within 1e-4, and does a sampled trajectory,
with ONNX Runtime sessions in the places of the pipeline's modules, agree within 1e-3? Differences
are relative to the largest value where that is above 1.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotexport.diffusion import graphs, pipeline_card, saving
from dotexport.diffusion.calibration import Progress
from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.diffusion.sampling import INDEX, component_of, load, sample
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.exports.verifying import require
from dotexport.storage import manifest
from dotexport.storage.files import write_json
from dotexport.storage.output import new_folder, occupied
from dotexport.storage.ownership import is_unfinished
from dotexport.storage.reading import read_json

TARGET = "onnx"
PRECISIONS = ("fp32", "fp16")
STEP_LIMIT, TRAJECTORY_LIMIT = 1e-4, 1e-3
HALF_STEP_LIMIT, HALF_TRAJECTORY_LIMIT = 2e-2, 1e-1
STEPS = 4
REPORT = "reports/verify.json"
TOKENIZER, TOKENIZER_CLASS = "tokenizer.json", "PreTrainedTokenizerFast"
VOCABULARIES = ("vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
WORDS = ("a photo of a cat", "a red bicycle", "mountains at dawn")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """How far an artifact is from torch.

    Attributes:
        step: largest difference of one call of any component.
        trajectory: largest difference of the latents after all steps.
        cases: batch and picture sizes that were tried.
    """

    artifact: str
    step: float
    trajectory: float
    step_limit: float
    trajectory_limit: float
    cases: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "cases": list(self.cases),
            "problems": list(self.problems),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Case:
    """One way to call a pipeline."""

    prompts: tuple[Any, ...]
    options: SampleOptions

    @property
    def name(self) -> str:
        size = f", {self.options.height} px" if self.options.height else ""
        return f"batch {len(self.prompts)}{size}"


def parse_target(spec: str) -> str:
    """Precision of `onnx`, `onnx:fp32` or `onnx:fp16`.

    Raises:
        UsageError: another target.
    """
    name, _, precision = spec.partition(":")
    if name != TARGET or precision not in ("", *PRECISIONS):
        raise UsageError(
            f"target {spec} cannot hold a pipeline; expected onnx, onnx:fp32 or onnx:fp16"
        )
    return precision or PRECISIONS[0]


def cases(pipe: Any, record: dict[str, Any]) -> list[Case]:
    """Two batch sizes and two picture sizes, called as the pipeline was calibrated."""
    asked = record.get("shrink", {}).get("sampling", {})
    takes = inspect.signature(type(pipe).__call__).parameters
    prompts = record.get("calibration", {}).get("examples") or _examples(takes)
    prompts = [prompts[n % len(prompts)] for n in range(3)]
    extra = dict(asked.get("extra", {}))
    options = SampleOptions(
        prompts="", steps=STEPS, guidance=asked.get("guidance"), batch=3, extra=extra
    )
    if "max_sequence_length" in takes:
        default = takes["max_sequence_length"].default
        length = int(extra.get("max_sequence_length", default))
        options = replace(options, extra=extra | {"max_sequence_length": length})
        extra = extra | {"max_sequence_length": length - 1 if length > 1 else 2}
    if "height" not in takes:
        first = second = options
    else:
        size = asked.get("height") or _default_size(pipe)
        first = replace(options, height=size, width=asked.get("width") or size)
        other = size if _takes_one_size(pipe) else _other_size(pipe, size)
        second = replace(first, height=other)
    return [Case(tuple(prompts[:2]), first), Case(tuple(prompts), replace(second, extra=extra))]


def _examples(takes: Any) -> list[Any]:
    return [0, 1, 2] if "class_labels" in takes else list(WORDS)


def _default_size(pipe: Any) -> int:
    config = getattr(pipe, component_of(pipe)).config
    latent = getattr(pipe, "default_sample_size", None) or config.sample_size
    return int(latent) * int(pipe.vae_scale_factor)


def _takes_one_size(pipe: Any) -> bool:
    """Whether positions are computed outside of the graph (PixArt): it then holds one size."""
    positions = getattr(getattr(pipe, component_of(pipe)), "pos_embed", None)
    return positions is not None and not getattr(positions, "pos_embed_max_size", True)


def _other_size(pipe: Any, size: int) -> int:
    """A smaller size that the pipeline takes: half, in steps of its patches."""
    step = 2 * int(pipe.vae_scale_factor)
    model = getattr(pipe, component_of(pipe))
    if component_of(pipe) == "unet":  # as often as a UNet halves a picture
        step = int(pipe.vae_scale_factor) * 2 ** (len(model.config.block_out_channels) - 1)
    half = size // 2 // step * step
    return half if half >= step else size + step


def export(
    folder: Path,
    targets: Sequence[str],
    *,
    out: Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> list[str]:
    """Write the graphs of every component, each artifact kept only if it agrees with torch.

    An output of dotexport takes its artifacts into itself; a plain pipeline needs `out`.

    Raises:
        UsageError, CheckpointError: what was asked for cannot be done.
        ParityError: an artifact does not compute what torch computes; it is not kept.
        RuntimeMissingError: onnxscript or ONNX Runtime is not installed.
    """
    precisions = [parse_target(spec) for spec in targets]
    _require_exporter()
    home = _home(folder, out, overwrite=overwrite)
    pipe = load(home / saving.FOLDER)
    names = []
    for precision in precisions:
        name = f"{TARGET}-{precision}"
        with occupied(home, shared=True), occupied(home / name):
            replaces = overwrite or is_unfinished(home / name)
            with new_folder(home / name, overwrite=replaces) as partial:
                tried = cases(pipe, manifest.read(home))
                write_graphs(pipe, home / saving.FOLDER, partial, tried, precision, progress)
                parity = check(pipe, partial, tried, name, precision) if verify else None
                if parity is not None:
                    _report(home, [parity])
                    require([parity], note="; it was not kept")
                files = manifest.hash_files(partial)
            _record(home, name, precision, files, parity)
        names.append(name)
    if "shrink" in manifest.read(home):
        pipeline_card.write(home)
    return names


def _require_exporter() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeMissingError(
            "exporting a pipeline needs onnxscript; install it with "
            "pip install 'dotexport[diffusion]'"
        ) from error


def _home(folder: Path, out: Path | None, *, overwrite: bool) -> Path:
    """The output that takes the artifacts; a new one for a plain pipeline."""
    if manifest.is_output(folder):
        if out is not None and out.resolve() != folder.resolve():
            raise UsageError(
                f"{folder} is an output of dotexport; leave the output folder (-o) away"
            )
        return folder
    if out is None:
        raise UsageError(
            f"{folder} is a plain pipeline, and nothing is written into it; give an output with -o"
        )
    saving.check_apart(folder, out)
    component = component_of(load(folder))
    with new_folder(out, overwrite=overwrite) as partial:
        shutil.copytree(folder, partial / saving.FOLDER, ignore=saving.ignore_pickles)
        manifest.update(
            partial,
            kind="diffusion",
            source=saving.describe_source(folder, component),
            artifacts={saving.FOLDER: saving.artifact(partial / saving.FOLDER)},
        )
    return out


def write_graphs(
    pipe: Any,
    source: Path,
    folder: Path,
    tried: Sequence[Case],
    precision: str,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """All graphs, configs and whatever else the pipeline reads, in the layout of optimum-onnx."""
    first, second = (record(pipe, case) for case in tried)
    wanted = graphs.parts(pipe)
    for number, part in enumerate(wanted):
        progress("exporting", number, len(wanted))
        owner = getattr(pipe, part.component)
        seen, half = (first[part.folder], second[part.folder]), precision == "fp16"
        graphs.write(owner, part, *seen, folder / part.folder, half=half)
        shutil.copyfile(
            source / part.component / "config.json", folder / part.folder / "config.json"
        )
    _companions(pipe, source, folder)
    progress("exporting", len(wanted), len(wanted))


def record(pipe: Any, case: Case) -> dict[str, graphs.Recording]:
    """Calls of all parts in one step of a pipeline, by folder."""
    asked = [part for part in graphs.parts(pipe) if part.component != "vae"]
    with graphs.recorded(pipe, asked) as seen:
        latents = sample(pipe, case.prompts, 0, replace(case.options, steps=1))
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        latents = _laid_out(latents, int(vae.config.latent_channels))
        with torch.no_grad():
            pictures = vae.decode(latents).sample
        seen["vae_decoder"] = graphs.Recording(
            vae.decode, (latents,), {}, [{"latent_sample": latents}]
        )
        seen["vae_encoder"] = graphs.Recording(vae.encode, (pictures,), {}, [{"sample": pictures}])
    return seen


def _laid_out(latents: Tensor, channels: int) -> Tensor:
    """Latents as a VAE reads them; of packed ones (Flux) only the number of values matters here."""
    if latents.ndim != 3:
        return latents
    side = int((latents[0].numel() / channels) ** 0.5)
    return latents.flatten(1)[:, : channels * side * side].reshape(-1, channels, side, side)


def _companions(pipe: Any, source: Path, folder: Path) -> None:
    """Scheduler, tokenizers and the index; weights are in the graphs."""
    modules = {part.component for part in graphs.parts(pipe)}
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and entry.name not in modules:
            shutil.copytree(entry, folder / entry.name, ignore=saving.ignore_pickles)
    index = read_json(source / INDEX, advice="save the pipeline again")
    for file in sorted(folder.glob(f"*/{TOKENIZER}")):
        if not any((file.parent / name).is_file() for name in VOCABULARIES):
            _name_for_both(file.parent, index)
    write_json(folder / INDEX, index)


def _name_for_both(tokenizer: Path, index: dict[str, Any]) -> None:
    """Name the class that transformers 4, which optimum-onnx needs, knows as well as 5.

    Transformers 5 names a tokenizer that is nothing but its tokenizer.json by classes that 4 does
    not have, or has with another vocabulary file.
    """
    index[tokenizer.name] = ["transformers", TOKENIZER_CLASS]
    config = tokenizer / "tokenizer_config.json"
    told = read_json(config, advice="save the pipeline again") if config.is_file() else {}
    write_json(config, told | {"tokenizer_class": TOKENIZER_CLASS})


# Verifying ---------------------------------------------------------------------------------------


def verify(out: Path, targets: Sequence[str] | None = None) -> list[Parity]:
    """Hold the artifacts of an output against torch; the manifest and the report say the verdict.

    Raises:
        CheckpointError: not an output of dotexport.
        UsageError: a target that is not there.
    """
    listed = manifest.read(out).get("artifacts", {})
    made = {name: entry for name, entry in listed.items() if entry["target"] == TARGET}
    wanted = [f"{TARGET}-{parse_target(spec)}" for spec in targets or ()] or list(made)
    if missing := [name for name in wanted if name not in made] or (not made and ["an artifact"]):
        raise UsageError(f"{out} has no {missing[0]} to verify; write one with dotexport export")
    pipe = load(out / saving.FOLDER)
    tried = cases(pipe, manifest.read(out))
    parities = []
    for name in wanted:
        parity = check(pipe, out / name, tried, name, made[name]["precision"])
        changed = manifest.changed_files(out / name, made[name]["files"])
        parity = replace(parity, problems=(*changed, *parity.problems))
        parities.append(parity)
        listed[name]["parity"] = parity.as_dict()
    manifest.update(out, artifacts=listed)
    _report(out, parities)
    return parities


def check(pipe: Any, folder: Path, tried: Sequence[Case], artifact: str, precision: str) -> Parity:
    """Measure one artifact; one that cannot be run has failed."""
    limits = (STEP_LIMIT, TRAJECTORY_LIMIT)
    if precision == "fp16":
        limits = (HALF_STEP_LIMIT, HALF_TRAJECTORY_LIMIT)
    step = trajectory = 0.0
    problems: list[str] = []
    try:
        for case in tried:
            step = max(step, _step(pipe, folder, case))
            trajectory = max(trajectory, _trajectory(pipe, folder, case))
    except (RuntimeMissingError, MemoryError):
        raise
    except Exception as error:  # the runtime has its own; all of them mean "does not run"
        logger.debug("%s cannot be run", artifact, exc_info=True)
        problems.append(f"it cannot be run: {type(error).__name__}: {error}")
    for what, found, limit in zip(
        ("one call", "a trajectory"), (step, trajectory), limits, strict=True
    ):
        if not found <= limit:  # NaN fails too
            problems.append(f"{what} differs from torch by {found:.2g}, more than {limit:.2g}")
    names = tuple(case.name for case in tried)
    return Parity(artifact, step, trajectory, *limits, names, tuple(problems))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


def _step(pipe: Any, folder: Path, case: Case) -> float:
    """One call of every part, session against torch."""
    worst = 0.0
    for name, recording in record(pipe, case).items():
        part = next(part for part in graphs.parts(pipe) if part.folder == name)
        with torch.no_grad():
            expected = graphs.answers(part, recording.method(*recording.args, **recording.kwargs))
        loaded = graphs.session(folder / name / graphs.GRAPH)
        for key, value in graphs.run(loaded, recording.calls[0]).items():
            worst = max(worst, difference(value, expected[key]))
    return worst


def _trajectory(pipe: Any, folder: Path, case: Case) -> float:
    """Latents after all steps, sampled with sessions in place of the modules."""
    expected = sample(pipe, case.prompts, 0, case.options)
    with graphs.in_place(pipe, folder):
        found = sample(pipe, case.prompts, 0, case.options)
    return difference(found, expected)


def _report(home: Path, parities: Sequence[Parity]) -> None:
    file = home / REPORT
    report = read_json(file, advice="remove it") if file.is_file() else {}
    artifacts = report.get("artifacts", {}) | {p.artifact: p.as_dict() for p in parities}
    write_json(file, {"environment": manifest.environment(), "artifacts": artifacts})


def _record(
    home: Path, name: str, precision: str, files: dict[str, Any], parity: Parity | None
) -> None:
    entry = {
        "target": TARGET,
        "precision": precision,
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": files,
        "parity": parity.as_dict() if parity else None,
    }
    manifest.merge(home, artifacts={name: entry})
