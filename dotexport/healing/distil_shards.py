"""Weights that several processes share: each keeps a piece of every tensor, and they bring a layer
together while it computes (torch's FSDP2, `fully_shard`).

What Masters does is there by itself: pieces are float32 and move by the optimiser, a layer that is
brought together is in the dtype of passes, and gradients are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dotexport.healing.distil_loss import Streams, read
from dotexport.healing.distil_masters import Masters
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.fused import in_memory
from dotexport.models.loading import empty_model, read_buffers
from dotexport.processes.processes import Several

TensorOf = Callable[[Checkpoint, str], Tensor]


def read_shards(model: Any, tokens_BL: Tensor, *, streams: bool) -> tuple[Tensor, Streams]:
    """As `read`, of a model in shards: every process calls it as often as the others."""
    states: tuple[Tensor, Streams] = model.read(tokens_BL, streams=streams)
    return states


@dataclass(frozen=True, kw_only=True)
class Shards(Masters):
    """This process's pieces of a model's weights, in float32.

    Attributes:
        judging: the same model in float32, whose weights come and go.
    """

    judging: Any
    mesh: DeviceMesh
    read: Any = field(default=read_shards)

    @classmethod
    def begin(cls, student: Checkpoint, passes: torch.dtype, processes: Several) -> Shards:
        """Of a checkpoint on the first process's disk."""
        mesh = mesh_of(processes)

        def told(checkpoint: Checkpoint, name: str) -> Tensor:
            return processes.agreed(lambda: checkpoint.tensor(name))

        def nothing(checkpoint: Checkpoint, name: str) -> Tensor:
            return torch.zeros(checkpoint.specs[name].shape)

        model = in_shards(student, torch.float32, processes, told, passes=passes)
        judging = in_shards(student, torch.float32, processes, nothing)
        weights = dict(model.named_parameters())
        return cls(model, weights, judging=judging.requires_grad_(False), mesh=mesh)

    def take_gradients(self) -> None:
        """They are where they belong."""

    def hand_back(self) -> None:
        """The model computes with these weights."""

    @contextmanager
    def computing_with(self, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
        with torch.no_grad():
            for name, parameter in self.judging.named_parameters():
                _piece(parameter).copy_(_piece(tensors[name]))
        try:
            yield self.judging
        finally:
            self.judging.reshard()  # what is together is not read anew

    def cut(self, whole: Tensor) -> Tensor:
        if whole.ndim == 0:  # the number of a step
            return whole
        at = whole.to(self.mesh.device_type)
        return distribute_tensor(at, self.mesh, [Shard(0)], src_data_rank=None)

    def whole(self, kept: Tensor) -> Tensor:
        return kept.full_tensor() if isinstance(kept, DTensor) else kept


def mesh_of(processes: Several) -> DeviceMesh:
    return init_device_mesh(processes.device.type, (processes.size,))


def in_shards(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    processes: Several,
    tensor_of: TensorOf | None = None,
    *,
    passes: torch.dtype | None = None,
) -> Any:
    """The stock model of a checkpoint, a piece of every tensor in each process.

    No process has more of it whole than one layer, or what is in none.

    Args:
        dtype: of what is kept.
        tensor_of: reads a tensor by its name in memory; all ask for the same ones, in one order.
            None: each process has the files.
        passes: dtype to compute in; None: that of what is kept.
    """
    model = empty_model(checkpoint, dtype, processes.device)
    stored = in_memory(checkpoint, dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def read_whole(name: str) -> Tensor:
        return tensor_of(stored, name) if tensor_of else stored.tensor(name)

    read_buffers(model, read_whole)
    policy = MixedPrecisionPolicy(param_dtype=passes, reduce_dtype=torch.float32)
    mesh = mesh_of(processes)
    filled: dict[str, nn.Parameter] = {}
    for part in (*model.get_decoder().layers, model):
        for module in part.modules():
            for key, parameter in module._parameters.items():
                if parameter is None or id(parameter) not in names:
                    continue
                name = names[id(parameter)]
                if name not in filled:
                    whole = read_whole(name).to(processes.device, dtype, copy=True)
                    filled[name] = nn.Parameter(whole)
                module._parameters[key] = filled[name]
        # The outermost part stays together between the pass forwards and the one back: its table
        # is asked for by the loss.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=part is not model)
    model.read = MethodType(read, model)
    register_fsdp_forward_method(model, "read")
    return model


def _piece(tensor: Any) -> Tensor:
    piece: Tensor = tensor.to_local()
    return piece
