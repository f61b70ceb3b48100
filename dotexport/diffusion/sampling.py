"""A diffusers pipeline as it is really used: its own prompts, scheduler and guidance.

Shapes: B pictures; latents keep the shape that the denoiser reads.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.pipeline_options import SampleOptions
from dotexport.errors import (
    CalibrationError,
    CheckpointError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from dotexport.models.quiet import quiet as quiet_all
from dotexport.storage.reading import read_json

INDEX = "model_index.json"
COMPONENTS = ("transformer", "unet")

logger = logging.getLogger(__name__)


def load(folder: Path) -> Any:
    """The pipeline of a folder, in float32.

    Raises:
        CheckpointError: not a pipeline, or a damaged one.
        RuntimeMissingError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise RuntimeMissingError(
            "diffusion pipelines need the library diffusers; install it with "
            "pip install 'dotexport[diffusion]'"
        ) from error
    import dotexport.diffusion.carrier  # noqa: F401  where model_index.json says pruned classes are

    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} is not a diffusers pipeline: it has no {INDEX}; give the folder that "
            "`save_pretrained` of a pipeline wrote"
        )
    index = read_json(folder / INDEX, advice="save the pipeline again")
    # What the folder says is not there has to be said again, or diffusers misses it.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                **absent,
            )
    except Exception as error:  # diffusers has no class of its own for these
        raise CheckpointError(f"{folder} cannot be loaded by diffusers: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet() -> AbstractContextManager[None]:
    """No bars and advice of other libraries while a pipeline loads or is saved."""
    import diffusers.utils.logging as theirs

    return quiet_all(theirs)


def component_of(pipe: Any) -> str:
    """Name of the component that denoises.

    Raises:
        UnsupportedModelError: a pipeline without one.
    """
    for name in COMPONENTS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UnsupportedModelError(
        f"{type(pipe).__name__} has neither of {', '.join(COMPONENTS)}; such pipelines cannot be "
        "pruned yet"
    )


def read_prompts(pipe: Any, options: SampleOptions) -> list[Any]:
    """Prompts, or class numbers where the pipeline takes those.

    Raises:
        CalibrationError: an unreadable or empty file, or labels that the pipeline does not know.
    """
    file = Path(options.prompts)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"the prompts {file} cannot be read ({error}); give a UTF-8 file, one prompt per line"
        ) from error
    prompts = [line for line in lines if line][: options.limit]
    if not prompts:
        raise CalibrationError(f"{file} holds no prompts; give a file with one prompt per line")
    return prompts if not _takes_labels(pipe) else [_label(pipe, line) for line in prompts]


def _takes_labels(pipe: Any) -> bool:
    return "class_labels" in inspect.signature(type(pipe).__call__).parameters


def _label(pipe: Any, line: str) -> int:
    if line.isdigit():
        return int(line)
    if line in pipe.labels:
        return int(pipe.labels[line])
    raise CalibrationError(f"{type(pipe).__name__} knows no class {line!r}; give numbers or labels")


def batches(prompts: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Number of the first prompt, and the prompts of one batch."""
    for first in range(0, len(prompts), size):
        yield first, list(prompts[first : first + size])


@torch.no_grad()
def sample(pipe: Any, prompts: Sequence[Any], first: int, options: SampleOptions) -> Tensor:
    """Latents of a batch of prompts; each has its own noise, whatever the batch.

    Raises:
        UsageError: arguments that this pipeline does not take.
    """
    generators = [
        torch.Generator().manual_seed(options.seed * 1_000_003 + first + n)
        for n in range(len(prompts))
    ]
    known = inspect.signature(type(pipe).__call__).parameters
    arguments = {
        "class_labels" if _takes_labels(pipe) else "prompt": list(prompts),
        "num_inference_steps": options.steps,
        "generator": generators,
        **{
            name: value
            for name, value in (
                ("guidance_scale", options.guidance),
                ("height", options.height),
                ("width", options.width),
            )
            if value is not None
        },
        **options.extra,
    }
    if strange := sorted(arguments.keys() - known.keys()):
        raise UsageError(f"{type(pipe).__name__} takes no {', '.join(strange)}")
    with _undecoded(pipe) as caught:
        # A pipeline without this choice decodes always, and that is caught.
        latent = {} if _takes_labels(pipe) else {"output_type": "latent"}
        made = pipe(**arguments, **latent)
    return caught[0] if caught else made[0]


@contextmanager
def _undecoded(pipe: Any) -> Iterator[list[Tensor]]:
    """Catch what a pipeline would decode, in the scale of its latents."""
    caught: list[Tensor] = []
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield caught
        return

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        caught.append(latents * getattr(vae.config, "scaling_factor", 1.0))
        return DecoderOutput(sample=latents)

    with replaced(vae, "decode", decode):
        yield caught


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """One attribute of one object is another for a while."""
    own = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, own)


class Clock:
    """Which step of the scheduler a pipeline is at.

    Steps are counted by the scheduler's distinct timesteps, the noisiest is 1: a second-order
    scheduler calls the model twice in one of them.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.calls = scheduler, 0

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """Follow the scheduler while a pipeline runs."""

        def after(method: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
            @functools.wraps(method)  # pipelines look at its signature
            def counted(*args: Any, **kwargs: Any) -> Any:
                made = method(*args, **kwargs)
                count()
                return made

            return counted

        with ExitStack() as stack:
            for name, count in (("step", self._tick), ("set_timesteps", self._reset)):
                method = getattr(self.scheduler, name)
                stack.enter_context(replaced(self.scheduler, name, after(method, count)))
            yield self

    def _tick(self) -> None:
        self.calls += 1

    def _reset(self) -> None:
        self.calls = 0

    @property
    def now(self) -> tuple[int, int]:
        """(t, T): the step the next call of the model belongs to, and how many there are."""
        seen: list[float] = []
        for timestep in self.scheduler.timesteps[: self.calls + 1].tolist():
            if timestep not in seen:
                seen.append(timestep)
        return max(len(seen), 1), len(set(self.scheduler.timesteps.tolist()))
