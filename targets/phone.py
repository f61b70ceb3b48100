"""ExecuTorch: one .pte for phones, its matrix products by XNNPACK, its KV cache inside.

Method forward(input_ids_1L, cache_position_L) -> logits_1LV appends L tokens, at most CHUNK a call,
to the one sequence whose cache it holds; constant methods say how much fits, under the names that
ExecuTorch's own LLM runner asks for. int4 is 8da4w: weights of 4 bits, 32 of them to one scale,
activations rounded to 8 bits per token.

Shapes: B sequences, L tokens of the longest prompt, D width, V vocabulary.
"""

from __future__ import annotations

import io
import logging
import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from dotexport.errors import CheckpointError, RuntimeMissingError, UsageError
from dotexport.exports.target import QUANTISED_BLOCK, Logits, Tokens
from dotexport.exports.text_parity import (
    TextSide,
    find_tokenizer,
    read_folder,
    start_of,
    stops_of,
)

if TYPE_CHECKING:
    from dotexport.exports.encoder_target import Arrays, EncoderGraph, EncoderSession
    from dotexport.models.checkpoint import Checkpoint


@contextmanager
def _quiet() -> Iterator[None]:
    """Its warnings are of itself and of torch; what goes wrong is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


with _quiet():
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

PROGRAM = "model.pte"
BACKEND = "XnnpackBackend"
CONTEXT = 2048  # slots of the cache at most: they are memory from the moment a program is loaded
INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  its stubs do not know it
CHUNK = 128  # tokens of one call: logits of that many are planned for, too


class ExecuTorch:
    """Writes by ExecuTorch's own lowering of a torch.export graph; runs in its Python runtime."""

    name = "executorch"
    summary = "ExecuTorch program for phones (XNNPACK; int4 is 8da4w), its KV cache inside"
    precisions = ("fp32", "int4")
    # int4 stores a shared table twice: to be looked up, and as the head's matrix.
    weight_bits: ClassVar = {"fp32": (32, 32), "int4": (4.5, 8, 12.5)}
    row_groups: ClassVar = {"int4": QUANTISED_BLOCK}
    exact_rounding = ()  # scales are rounded to bfloat16, activations per token
    encoder_precisions = ("fp32",)

    def missing(self) -> list[str]:
        return []  # without executorch this file cannot be imported

    def problems(self, checkpoint: Checkpoint, precision: str) -> list[str]:
        from .hf import HuggingFace

        stock = HuggingFace().problems(checkpoint, "as-stored")
        return stock + self.config_problems(checkpoint.config, precision)

    def config_problems(self, config: Mapping[str, Any], precision: str) -> list[str]:
        from .traced import graph_problems

        return graph_problems(config, precision)

    def write(self, checkpoint: Checkpoint, folder: Path, precision: str) -> None:
        from .bounded import trace_bounded
        from .hf import HuggingFace

        context = _context(checkpoint.config)
        model = HuggingFace().open(checkpoint.folder).model
        with _quiet():
            if precision == "int4":
                _round_products(model)
                model.set_input_embeddings(RoundedTable(model.get_input_embeddings()))
            elif model.get_output_embeddings().weight is model.get_input_embeddings().weight:
                model.set_output_embeddings(SharedTable(model.get_input_embeddings().weight))
            program = trace_bounded(model, context=context, chunk=min(CHUNK, context))
            lowered = _lower(program, _constants(checkpoint))
        _save(lowered, folder)
        for companion in [checkpoint.folder / "config.json", *checkpoint.companions()]:
            shutil.copyfile(companion, folder / companion.name)

    def text(self, checkpoint: Checkpoint, folder: Path) -> TextSide | None:
        """The tokenizer beside the program, and the start and ends that the program names."""
        program = _load(folder / PROGRAM)
        said = {
            name: program.load_method(name).execute([])
            for name in ("get_bos_id", "get_eos_ids")
            if name in program.method_names
        }
        start = said.get("get_bos_id", [None])[0]
        return read_folder(folder, start=start, stops=said.get("get_eos_ids", []))

    def open(self, folder: Path, *, threads: int | None = None) -> ExecuTorchSession:
        return ExecuTorchSession(folder, threads=threads)

    def write_encoder(self, graph: EncoderGraph, folder: Path, precision: str) -> None:
        with _quiet():
            _save(_lower(graph.program(single=True), {"get_max_seq_len": graph.context}), folder)

    def open_encoder(self, folder: Path, *, threads: int | None = None) -> EncoderSession:
        return RowByRow(folder, threads=threads)


def _save(lowered: Any, folder: Path) -> None:
    with (folder / PROGRAM).open("wb") as file:
        lowered.write_to_file(file)


def _context(config: Mapping[str, Any]) -> int:
    return min(config.get("max_position_embeddings") or CONTEXT, CONTEXT)


def _constants(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ExecuTorch's LLM runner asks a program for, the start and all ends among it."""
    config, context = checkpoint.config, _context(checkpoint.config)
    start = start_of(checkpoint.folder, find_tokenizer(checkpoint.folder))
    ends = stops_of(checkpoint.folder)
    known = {
        "get_max_context_len": context,
        "get_max_seq_len": min(CHUNK, context),
        "get_vocab_size": config["vocab_size"],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if start is not None:
        known["get_bos_id"] = start
    if ends:
        known["get_eos_ids"] = ends
    return known


class SharedTable(torch.nn.Module):
    """An output head that multiplies with the table of the embedding where it lies.

    As a linear layer it would be one of XNNPACK's weights, which are stored apart from those of
    other operators, and the table would be stored twice.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x_1LD: torch.Tensor) -> torch.Tensor:
        table_1VD = self.weight.view(1, *self.weight.shape)
        return torch.bmm(table_1VD, x_1LD.transpose(1, 2)).transpose(1, 2)


class RoundedTable(torch.nn.Module):
    """A table that is only looked up, in 255 levels with one step per token.

    Of what its class says of every token, the scale of Gemma's embeddings included.
    """

    level_VD: torch.Tensor
    step_V: torch.Tensor

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        rows: Any = table.num_embeddings
        with torch.no_grad():
            said_VD = table(torch.arange(rows)).float()
        largest_V = said_VD.abs().amax(1)
        step_V = torch.where(largest_V == 0, torch.ones_like(largest_V), largest_V / 127)
        self.register_buffer("level_VD", (said_VD / step_V[:, None]).round().to(torch.int8))
        self.register_buffer("step_V", step_V)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        level_BLD = torch.nn.functional.embedding(tokens_BL, self.level_VD)
        return level_BLD.float() * self.step_V[tokens_BL][..., None]


def _round_products(model: Any) -> None:
    """Rows that do not divide into groups get 8 bits and one scale."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig

    def rounding(bits: torch.dtype, granularity: Any) -> Any:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=bits,
            weight_granularity=granularity,
            # Scales for the least error instead of for the largest weight.
            intx_choose_qparams_algorithm="hqq_scale_only",
        )

    def in_groups(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and module.in_features % QUANTISED_BLOCK == 0

    def odd(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and not in_groups(module, name)

    quantize_(model, rounding(torch.int8, PerAxis(0)), odd)
    quantize_(model, rounding(INT4, PerGroup(QUANTISED_BLOCK)), in_groups)


def _lower(program: Any, constants: dict[str, Any]) -> Any:
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )

    edge = to_edge_transform_and_lower(
        program,
        partitioner=[_partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=constants,
    )
    # In place, or every step would copy the cache.
    return edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))


def _partitioner() -> Any:
    """XNNPACK takes matrix products and what lies between them.

    Left to itself it takes every operator that it knows, in many small pieces between views that it
    does not, and goes wrong where it permutes a tensor of four dimensions of dynamic length.
    """
    from executorch.backends.xnnpack.partition.config import gemm_configs, generic_node_configs
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    generic = ("BMM", "Add", "Mul", "Sigmoid", "ReciprocalSquareRoot", "Pow", "Softmax")
    taken = [getattr(generic_node_configs, f"{name}Config") for name in generic]

    class Products(XnnpackPartitioner):  # type: ignore[misc]  # whose type is not known
        def ops_to_not_decompose(self, program: Any) -> tuple[list[Any], None]:
            return [torch.ops.aten.linear.default], None

        def generate_partitions(self, program: Any) -> list[Any]:
            found = super().generate_partitions(program)
            return [part for part in found if any(map(_is_product, part.nodes))]

    partitioner = Products(configs=[gemm_configs.LinearConfig, *taken])
    # One of its seventeen passes is all that these operators need, and each takes its time.
    short = CompileSpec("dqlinear_partitioner", b"")
    partitioner.delegation_spec = DelegationSpec(BACKEND, [short])
    return partitioner


def _is_product(node: Any) -> bool:
    return any(name in str(node.target) for name in ("aten.linear", "aten.bmm"))


class ExecuTorchSession:
    """As many copies of the program as there are sequences, because each holds one cache."""

    providers = (BACKEND,)

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        if not Runtime.get().backend_registry.is_available(BACKEND):
            raise RuntimeMissingError(
                f"this build of executorch has no {BACKEND}; pip install --force-reinstall "
                "executorch"
            )
        self.file = folder / PROGRAM
        if threads is not None:
            _use_threads(threads)
        self.programs = [_load(self.file)]
        _OPEN.add(self)
        self.context, self.chunk, self.vocab = (
            self.programs[0].load_method(name).execute([])[0]
            for name in ("get_max_context_len", "get_max_seq_len", "get_vocab_size")
        )

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        B, L = tokens_BL.shape
        lengths = [L] * B if lengths_B is None else list(lengths_B)
        self._check_room(max(lengths))
        while len(self.programs) < B:
            self.programs.append(_load(self.file))
        self.length_B = np.zeros(B, dtype=np.int64)
        logits_BLV = np.zeros((B, L, self.vocab), dtype=np.float32)
        for row, length in enumerate(lengths):
            for first in range(0, length, self.chunk):
                part = slice(first, min(first + self.chunk, length))
                logits_BLV[row, part] = self._append(row, tokens_BL[row, part])
        return logits_BLV

    def step(self, tokens_B: Tokens) -> Logits:
        if not self.programs:
            raise UsageError(CHANGED_THREADS)
        self._check_room(int(self.length_B.max()) + 1)
        return np.stack(
            [self._append(row, tokens_B[row : row + 1])[0] for row in range(len(tokens_B))]
        )

    def _append(self, row: int, tokens_L: Tokens) -> Logits:
        first, L = int(self.length_B[row]), len(tokens_L)
        tokens_1L = torch.from_numpy(np.array(tokens_L, dtype=np.int64))[None]
        forward = self.programs[row].load_method("forward")
        [logits_1LV] = forward.execute([tokens_1L, torch.arange(first, first + L)])
        self.length_B[row] += L
        logits_LV: Logits = logits_1LV[0].numpy()
        return logits_LV

    def _check_room(self, length: int) -> None:
        if length > self.context:
            raise UsageError(
                f"a sequence of {length} tokens does not fit the {self.context} slots of this "
                "program; use shorter prompts or decode fewer tokens"
            )


class RowByRow:
    """An encoder's program, which reads one sequence at a time."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        if threads is not None:
            _use_threads(threads)
        self.programs = [_load(folder / PROGRAM)]
        _OPEN.add(self)

    def __call__(self, inputs: Arrays) -> list[Any]:
        if not self.programs:
            raise UsageError(CHANGED_THREADS)
        forward = self.programs[0].load_method("forward")
        rows = []
        for row in range(len(inputs["input_ids"])):
            some = [torch.from_numpy(value[row : row + 1].copy()) for value in inputs.values()]
            rows.append([made.numpy().copy() for made in forward.execute(some)])
        return [np.concatenate(made) for made in zip(*rows, strict=True)]


CHANGED_THREADS = (
    "another session has changed the number of threads, which one pool serves, and this cache went "
    "with it; start again"
)
# Programs keep the pool that they were loaded with, and one pool serves the whole process: run
# after it was replaced, they wait for ever.
_OPEN: weakref.WeakSet[ExecuTorchSession | RowByRow] = weakref.WeakSet()


def _use_threads(threads: int) -> None:
    with _kept_stderr():
        if portable_lib._threadpool_get_thread_count() != threads:
            for session in _OPEN:
                session.programs.clear()
            portable_lib._unsafe_reset_threadpool(threads)


def _load(file: Path) -> Any:
    try:
        with _kept_stderr() as kept:
            program = Runtime.get().load_program(file)
            program.load_method("forward")
    except (RuntimeError, OSError) as error:
        said = " | ".join(kept[-3:])
        raise CheckpointError(
            f"executorch cannot load {file}: {error} {said}; export it again"
        ) from error
    return program


@contextmanager
def _kept_stderr() -> Iterator[list[str]]:
    """It says on stderr, among other things, which processors it does not know.

    Yields what fills with these lines in the end.
    """
    lines: list[str] = []
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield lines
    finally:
        lines += said.getvalue().splitlines()
