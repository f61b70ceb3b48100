"""What a run of narrowing is made of: streams, classes before and after, and a writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dotexport.axes.carrying import carry
from dotexport.axes.plan import Plan
from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.models.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from dotexport.models.layers import Stock
from dotexport.models.shapes import shapes, slots
from dotexport.narrowing.basis import check_basis
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.context import context_weights
from dotexport.narrowing.judging import JUDGED
from dotexport.narrowing.narrow_options import AUTO, NarrowOptions
from dotexport.narrowing.norm_statistics import Progress
from dotexport.narrowing.original import Original
from dotexport.narrowing.run import (
    REHEARSED,
    REHEARSED_LENGTH,
    REHEARSED_PER_AXIS,
    Narrowing,
    Nowhere,
    Writer,
)
from dotexport.narrowing.streams import Streams, held_out_windows
from dotexport.processes.processes import ALONE, Processes, Several
from dotexport.storage.files import write_json
from dotexport.storage.workspace import Workspace

WIDE = 512  # hidden_size from which on a pass takes the time of its products


def prepare(
    source: Checkpoint,
    decided: Plan,
    folder: Path,
    text: CalibrationText,
    options: NarrowOptions,
    *,
    device: torch.device | None = None,
    max_shard_bytes: int = 4 << 30,
    progress: Progress = lambda stage, done, total: None,
    workspace: Workspace | None = None,
    processes: Processes = ALONE,
) -> Narrowing:
    """Everything a run needs, with config.json and empty weight files already in FOLDER/hf.

    Args:
        processes: the first of those that share the windows; the others take part (`take_part`).
    """
    source, decided = carry(source, decided.of_layers(decided.kept_layers))
    family = decided.family
    check_basis(options.basis, family.architecture, rotates=family.rotates)
    write_json(folder / "hf" / "config.json", decided.config(source.config))
    writer = CheckpointWriter(
        folder / "hf", tensor_specs(source, decided), max_shard_bytes=max_shard_bytes
    )
    for name in family.per_layer.unchanged if family.per_layer else ():
        writer.write(name, source.tensor(name))
    where = device or torch.device("cpu")
    streams = _streams(decided, text, where, folder, processes)
    run = _assemble(source, decided, streams, writer, options, progress)
    return replace(run, workspace=workspace or Workspace())


def rehearsals(
    source: Checkpoint,
    text: CalibrationText,
    options: NarrowOptions,
    device: torch.device,
    *,
    processes: Processes = ALONE,
) -> Callable[..., float]:
    """A function from a plan, and how many times the text of a first look it takes (`times`), to
    its held-out divergence, from a closed form that writes nothing.

    It sees a part of the text, and takes the cheap way where there is one: PCA for a basis that
    would be learned or searched, no transport, no healing. The divergence is the mean of both kinds
    of text, and in it tokens count by context (context.py).
    """
    text = text.last(REHEARSED_LENGTH)
    tokens = rehearsed_tokens(source.config["hidden_size"])
    cheap = replace(settled(options, source, device), mlp="obs", heads="obs", local=None)
    known: list[torch.Tensor] = []

    def measure(planned: Plan, times: int = 1) -> float:
        fitted_on = -(-times * tokens // text.length)
        rough = "pca" if carry(source, planned)[1].family.rotates else "select"
        basis = options.basis if options.basis in ("dot", "select") else rough
        asked = (source, planned, text, replace(cheap, basis=basis), fitted_on)
        if not known:
            known.append(_weights(source, planned, text, cheap, device))
        processes.tell(take_part, *asked, known[0])
        return _rehearsed(processes, device, *asked, known[0]).divergence

    return measure


def _weights(
    source: Checkpoint,
    planned: Plan,
    text: CalibrationText,
    options: NarrowOptions,
    device: torch.device,
) -> torch.Tensor:
    """How much each token of all windows counts where some of them judge."""
    source, whole = carry(source, replace(planned, after=planned.before, layers=None))
    stock = Stock.of(source.config, device, dtype_of_passes(source, options, device))
    original = Original(source, whole.family, whole.before, stock, device)
    found = []
    for kind_NL in text.kinds:
        judging = slice(-_judged(text) - len(held_out_windows(len(kind_NL))), None)
        weights_NL = torch.ones(kind_NL.shape)
        weights_NL[judging] = context_weights(original, kind_NL[judging])
        found.append(weights_NL)
    return torch.cat(found)


def take_part(processes: Several, *asked: Any) -> None:
    """What other processes do while the first narrows with `prepare`, or rehearses that.

    Args:
        asked: source, plan, text, settled options, windows to fit on (all), how
            much tokens count.
    """
    _rehearsed(processes, processes.device, *asked)


def _rehearsed(
    processes: Processes,
    device: torch.device,
    source: Checkpoint,
    planned: Plan,
    text: CalibrationText,
    options: NarrowOptions,
    fitted_on: int | None = None,
    weights_NL: torch.Tensor | None = None,
) -> Narrowing:
    """A run that writes nothing."""
    carried, decided = carry(source, planned.of_layers(planned.kept_layers))
    streams = _streams(decided, text, device, None, processes)
    streams.weights_NL = weights_NL
    if fitted_on is not None:
        streams = streams.some(fitted_on, _judged(text))
    writer = Nowhere(tensor_specs(carried, decided))
    quiet: Progress = lambda stage, done, total: None  # noqa: E731
    run = _assemble(carried, decided, streams, writer, options, quiet)
    run.run()
    return run


def _judged(text: CalibrationText) -> int:
    """How many windows of a kind a rehearsal does not fit on, where it leaves so many."""
    return -(-JUDGED // text.length)


def rehearsed_tokens(hidden_size: int) -> int:
    """How many tokens a rehearsal fits on."""
    return max(REHEARSED, REHEARSED_PER_AXIS * hidden_size)


def _streams(
    decided: Plan,
    text: CalibrationText,
    device: torch.device,
    scratch: Path | None,
    processes: Processes,
) -> Streams:
    return Streams.allocate(
        text.windows_NL,
        decided.before.hidden_size,
        decided.after.hidden_size,
        device=device,
        scratch=scratch,
        other_NL=text.other_NL,
        processes=processes,
    )


def _assemble(
    source: Checkpoint,
    decided: Plan,
    streams: Streams,
    writer: Writer,
    options: NarrowOptions,
    progress: Progress,
) -> Narrowing:
    passes = dtype_of_passes(source, options, streams.device)
    stock = Stock.of(source.config, streams.device, passes)
    return Narrowing(
        Original(source, decided.family, decided.before, stock, streams.device),
        decided,
        Stock.of(decided.config(source.config), streams.device, passes),
        streams,
        writer,
        options,
        progress,
    )


def settled(options: NarrowOptions, source: Checkpoint, device: torch.device) -> NarrowOptions:
    """The same with what `--passes` comes to here, for all processes."""
    passes = str(dtype_of_passes(source, options, device)).removeprefix("torch.")
    return replace(options, passes=passes)


def dtype_of_passes(
    source: Checkpoint, options: NarrowOptions, device: torch.device
) -> torch.dtype:
    """What `--passes` comes to for this model on this device."""
    if options.passes != AUTO:
        return torch.bfloat16 if options.passes == "bfloat16" else torch.float32
    stored = {spec.dtype for spec in source.specs.values() if len(spec.shape) == 2}
    return usual_passes(source.config["hidden_size"], stored, device)


def usual_passes(
    hidden_size: int, stored: Collection[torch.dtype], device: torch.device
) -> torch.dtype:
    """bfloat16 for matrices that are stored so, where it saves time; else float32."""
    worth_it = hidden_size >= WIDE and set(stored) == {torch.bfloat16}
    return torch.bfloat16 if worth_it and multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; old releases of torch cannot say."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def pick_device(name: str) -> torch.device:
    """The device of `--device`, a GPU with its number; auto is the first where there is one.

    Raises:
        UsageError: no name of a device, or of one that cannot serve.
        RuntimeMissingError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "mps":
        raise UsageError(
            f"--device {name} has no float64, in which sums and solves are done; use --device cpu"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name} is not known; expected auto, cpu, cuda or cuda:1")
    if name == "cpu":
        return torch.device("cpu")
    number = int(name.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise RuntimeMissingError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use "
            "--device cpu, or install a torch built for your GPU"
        )
    return torch.device("cuda", number)


def tensor_specs(source: Checkpoint, decided: Plan) -> dict[str, TensorSpec]:
    """Every tensor of the narrower model; what is new takes the type of the embedding."""
    family = decided.family
    stored = source.specs
    table = stored[f"{family.embedding}.weight"]
    numbers = {family.layer_name(place, ""): n for place, n in enumerate(decided.kept_layers)}

    def of(name: str) -> str:
        """Its name in the original, whose layers have other numbers."""
        prefix = next((prefix for prefix in numbers if name.startswith(prefix)), None)
        if prefix is None:
            return name
        return family.layer_name(numbers[prefix], name.removeprefix(prefix))

    places = slots(family, decided.after)
    return {
        name: TensorSpec(shape, stored.get(of(name), table).dtype, places.get(name))
        for name, shape in shapes(family, decided.after)
    }
