"""Components of a pipeline as ONNX graphs, in the folders and with the names that
`ORTDiffusionPipeline` of optimum-onnx reads.

What a component is given is not written down per class: the pipeline runs twice, with other batch
and picture sizes, every call of a component is recorded, and the axes that differ are dynamic.

Shapes: B pictures.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dotexport.diffusion.sampling import COMPONENTS, replaced
from dotexport.errors import UnsupportedModelError

GRAPH = "model.onnx"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
Call = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One graph: a method of a component, where its graph lies, and its input's name there, if
    that is another one."""

    folder: str
    component: str
    method: str = "forward"
    input: str | None = None


DECODER = Part("vae_decoder", "vae", "decode", "latent_sample")
ENCODER = Part("vae_encoder", "vae", "encode", "sample")


def parts(pipe: Any) -> list[Part]:
    """The graphs of a pipeline, its denoiser first."""
    names = [*COMPONENTS, *TEXT_ENCODERS]
    found = [Part(n, n) for n in names if isinstance(getattr(pipe, n, None), nn.Module)]
    if isinstance(getattr(pipe, "vae", None), nn.Module):
        found += [DECODER, ENCODER]
    return found


def is_denoiser(part: Part) -> bool:
    return part.component in COMPONENTS


# What a component is given -----------------------------------------------------------------------


def flat(
    part: Part, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Tensors of a call by name; those inside of a dictionary by their name in there."""
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    found: Call = {}
    for name, value in bound.items():
        if isinstance(value, Tensor):
            found[part.input or name] = value
        elif isinstance(value, Mapping):
            found |= {key: inner for key, inner in value.items() if isinstance(inner, Tensor)}
    return found


def _filled(part: Part, first: Recording, values: Call) -> inspect.BoundArguments:
    """The arguments of a recorded call, with other tensors in their places."""
    bound = inspect.signature(first.method).bind(*first.args, **first.kwargs)
    for name, value in bound.arguments.items():
        if isinstance(value, Tensor):
            bound.arguments[name] = values[part.input or name]
        elif isinstance(value, Mapping):
            bound.arguments[name] = {key: values.get(key, inner) for key, inner in value.items()}
    return bound


@dataclass
class Recording:
    """The first call of one part, and the tensors of all calls."""

    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: list[Call]


@contextmanager
def recorded(pipe: Any, wanted: Sequence[Part]) -> Iterator[dict[str, Recording]]:
    """Record what parts are given while a pipeline runs, by folder."""
    seen: dict[str, Recording] = {}

    def recording(part: Part, method: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            call = {key: value.clone() for key, value in flat(part, method, args, kwargs).items()}
            seen.setdefault(part.folder, Recording(method, args, kwargs, [])).calls.append(call)
            return method(*args, **kwargs)

        return record

    with ExitStack() as stack:
        for part in wanted:
            owner = getattr(pipe, part.component)
            method = getattr(owner, part.method)
            stack.enter_context(replaced(owner, part.method, recording(part, method)))
        yield seen


# What it answers ---------------------------------------------------------------------------------


def answers(part: Part, made: Any) -> dict[str, Tensor]:
    """Tensors that a component answers with, under the names of their outputs."""
    if part.folder == "vae_encoder":
        return {"latent_parameters": made.latent_dist.parameters}
    if part.folder == "vae_decoder":
        return {"sample": _first(made)}
    if is_denoiser(part):
        return {"out_sample" if part.component == "unet" else "out_hidden_states": _first(made)}
    fields = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    hidden = made.get("hidden_states") or ()
    return fields | {f"hidden_states.{n}": value for n, value in enumerate(hidden)}


def _first(made: Any) -> Tensor:
    first: Tensor = made[0] if isinstance(made, tuple) else made.sample
    return first


def rebuilt(part: Part, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> Any:
    """What the pipeline expects, from the outputs of a graph."""
    if part.component in TEXT_ENCODERS:
        from transformers.utils.generic import ModelOutput

        fields = {name: value for name, value in outputs.items() if "." not in name}
        hidden = tuple(value for name, value in outputs.items() if "." in name)
        return ModelOutput(**fields, **({"hidden_states": hidden} if hidden else {}))
    (value,) = outputs.values()
    if kwargs.get("return_dict") is False:
        return (value,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=value)


# Writing -----------------------------------------------------------------------------------------


class _Adapter(nn.Module):
    """A part as a function of tensors alone; one in float16 is still given float32."""

    def __init__(self, owner: nn.Module, part: Part, first: Recording, *, half: bool) -> None:
        super().__init__()
        self.owner = copy.deepcopy(owner).half() if half else owner
        self.part, self.first, self.halves = part, first, half
        self.names = list(first.calls[0])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.names, tensors, strict=True))
        return tuple(self.named(values).values())

    def named(self, values: Call) -> dict[str, Tensor]:
        """Answers to these tensors by name."""
        if self.halves:
            values = {name: _halved(value) for name, value in values.items()}
        asked = _filled(self.part, self.first, values)
        made = getattr(self.owner, self.part.method)(*asked.args, **asked.kwargs)
        found = answers(self.part, made)
        return {name: value.float() for name, value in found.items()} if self.halves else found


def _halved(value: Tensor) -> Tensor:
    """Times stay as they are: of one near 1000 float16 knows no fraction."""
    return value.half() if value.is_floating_point() and value.ndim > 1 else value


def write(
    owner: nn.Module,
    part: Part,
    first: Recording,
    second: Recording,
    folder: Path,
    *,
    half: bool = False,
) -> None:
    """Write one part as FOLDER/model.onnx; axes in which the two recordings differ are dynamic.

    Args:
        half: weights and what is computed in float16; inputs and outputs stay float32.

    Raises:
        UnsupportedModelError: torch cannot trace it.
    """
    adapter = _Adapter(owner, part, first, half=half).eval()
    one, two = first.calls[0], second.calls[0]
    shapes = tuple(
        {
            axis: torch.export.Dim.AUTO
            for axis, (a, b) in enumerate(zip(one[name].shape, two[name].shape, strict=True))
            if a != b
        }
        for name in adapter.names
    )
    tensors = tuple(one[name] for name in adapter.names)
    with torch.no_grad():
        outputs = list(adapter.named(one))
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _hushed():
        try:
            # By itself torch.onnx keeps equal axes apart, and a mask then fits nothing.
            traced = torch.export.export(adapter, tensors, dynamic_shapes=(shapes,), strict=False)
            _mend(traced)
            program = torch.onnx.export(
                traced, input_names=adapter.names, output_names=outputs, dynamo=True, verbose=False
            )
        except Exception as error:  # tracing has no class of its own for what it cannot follow
            reason = str(error).partition("\n")[0]
            raise UnsupportedModelError(
                f"{part.component} ({type(owner).__name__}) cannot be written as ONNX by torch "
                f"{torch.__version__}: {reason}"
            ) from error
        assert program is not None
        program.save(folder / GRAPH)


def _mend(traced: torch.export.ExportedProgram) -> None:
    """What is nothing to torch and an error to ONNX: PixArt squeezes an axis that is longer than 1,
    and SDXL in float16 joins tensors of two types."""
    graph = traced.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        (source, *_) = node.args
        if node.meta["val"].ndim == source.meta["val"].ndim:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.concat.default):
        (parts, *rest), dtype = node.args, node.meta["val"].dtype
        with graph.inserting_before(node):
            node.args = ([_cast(graph, part, dtype) for part in parts], *rest)


def _cast(graph: torch.fx.Graph, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta["val"] = node.meta["val"].to(dtype)
    return cast


@contextmanager
def _hushed() -> Iterator[None]:
    """torch's exporter prints and warns about what does not concern whoever calls it."""
    threshold = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(threshold)


# Running -----------------------------------------------------------------------------------------


def session(file: Path, *, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        RuntimeMissingError: ONNX Runtime is not installed.
    """
    from dotexport.errors import RuntimeMissingError

    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeMissingError("running needs onnxruntime; pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def feed(loaded: Any, call: Call) -> dict[str, Any]:
    """What a session is given for a call, in the types of its inputs."""
    types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    types |= {
        "tensor(int64)": torch.int64,
        "tensor(int32)": torch.int32,
        "tensor(bool)": torch.bool,
    }
    return {
        entry.name: call[entry.name].to(types[entry.type]).numpy() for entry in loaded.get_inputs()
    }


def run(loaded: Any, call: Call) -> dict[str, Tensor]:
    """Outputs of a session by name."""
    names = [entry.name for entry in loaded.get_outputs()]
    made = loaded.run(names, feed(loaded, call))
    return {name: torch.from_numpy(value) for name, value in zip(names, made, strict=True)}


@contextmanager
def in_place(pipe: Any, folder: Path, *, threads: int | None = None) -> Iterator[dict[str, Any]]:
    """The pipeline runs on ONNX Runtime: sessions stand in the places of its modules."""

    def answer(part: Part, method: Callable[..., Any], loaded: Any) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            return rebuilt(part, run(loaded, flat(part, method, args, kwargs)), kwargs)

        return ask

    with ExitStack() as stack:
        sessions = {}
        for part in parts(pipe):
            if part.folder == "vae_encoder":  # no pipeline that makes pictures from words asks it
                continue
            owner = getattr(pipe, part.component)
            method = getattr(owner, part.method)
            sessions[part.folder] = session(folder / part.folder / GRAPH, threads=threads)
            ask = answer(part, method, sessions[part.folder])
            stack.enter_context(replaced(owner, part.method, ask))
        yield sessions
