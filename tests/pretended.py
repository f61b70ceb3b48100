"""A GPU that is none: tensors that say they lie on one, and a count of what would cross over.

Values are computed on the host. What a real device refuses (tensors of two devices in one
operation, numpy of its memory) is refused here as well; bytes that are sent to it, and places where
the host waits for it, are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dotexport

HOUSE = str(Path(dotexport.__file__).parent)
COUNT = 2  # devices that are there
COPIES = {"copy_", "_to_copy"}
BY_INDEX = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}
SCALARS = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2"}


class Away(Tensor):
    """What lies on the device; `host` has its values."""

    host: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, host: Tensor, place: torch.device) -> Away:
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )
        made.host, made.place = host, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        _gpu().waits[_where()] += 1
        return self.host.tolist()

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):
            value = self.new_full((), value)
        super().__setitem__(index, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _gpu().computed(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """While it is entered, operations for the device come here.

    Attributes:
        sent: bytes from the host.
        waits: line of dotexport -> how often the host waited there.
        places: devices that held a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.waits: Counter[str] = Counter()
        self.places: set[str] = set()
        self.latest = torch.device("cuda", 0)  # `x.to(y)` does not say which one y is on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.computed(func, args, kwargs or {})

    def computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, Away)]
        here = [
            t for t in tensors if not isinstance(t, Away) and t.device.type == "cpu" and t.dim()
        ]
        if name not in COPIES:
            self._check(name, args, away, here)
        place = self._place(name, kwargs, away)
        if (name in SCALARS and away) or self._by_mask(name, args, away):
            self.waits[_where()] += 1
        if name in COPIES and not isinstance(tensors[-1 if name == "copy_" else 0], Away):
            target = tensors[0].device if name == "copy_" and away else place
            if target is not None:
                self.sent += here[-1].nbytes if here else 0
        said = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        bring = partial(_on_host, asked=place is not None)
        found = func(*tree_map(bring, args), **tree_map(bring, said))
        if place is None:
            return found
        self.latest = place
        self.places.add(str(place))
        known = {id(tensor.host): tensor for tensor in away}  # what was changed in place

        def sent(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else Away(value, place)

        return tree_map(sent, found)

    def _check(self, name: str, args: Any, away: list[Away], here: list[Tensor]) -> None:
        places = {str(tensor.place) for tensor in away}
        if name in BY_INDEX and away and isinstance(args[0], Away):
            indices = {id(t) for t in tree_leaves(args[1]) if isinstance(t, Tensor)}
            self.sent += sum(t.nbytes for t in here if id(t) in indices)
            here = [t for t in here if id(t) not in indices]
        if len(places) > 1 or (places and here):
            shapes = [tuple(tensor.shape) for tensor in here]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got {sorted(places)} "
                f"and host tensors {shapes} at {_where()}"
            )

    def _place(self, name: str, kwargs: dict[str, Any], away: list[Away]) -> torch.device | None:
        """Where a result lies: as asked for, else beside the operands; None: on the host."""
        asked = kwargs.get("device")
        if asked is None:
            return away[0].place if away else None
        kind = torch.device(asked)
        if kind.type == "cuda":
            return torch.device("cuda", kind.index or 0)
        # What is made like a tensor of the device is asked for where its wrapper seems to lie.
        if kind.type == "meta" and (away or (name == "_to_copy" and not _without_values())):
            return away[0].place if away else self.latest
        return None

    def _by_mask(self, name: str, args: Any, away: list[Away]) -> bool:
        masks = tree_leaves(args[1]) if name in BY_INDEX and away else ()
        return any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks)


def _without_values() -> bool:
    """Whether a model is being made whose parameters really have none: accelerate does so."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "register_empty_parameter":
            return True
        frame = frame.f_back
    return False


_entered: list[Gpu] = []


def _gpu() -> Gpu:
    return _entered[-1]


def _on_host(value: Any, *, asked: bool) -> Any:
    if isinstance(value, Away):
        return value.host
    if isinstance(value, torch.device) and (
        value.type == "cuda" or (asked and value.type == "meta")
    ):
        return torch.device("cpu")
    return value


def _where() -> str:
    """The innermost line of dotexport that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(HOUSE):
            return f"{file.removeprefix(HOUSE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Two GPUs, as far as torch can tell."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: 0,
        "set_device": _set_device,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (70 << 30, 80 << 30),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: SimpleNamespace(
            major=9, minor=0, total_memory=80 << 30, name="pretended"
        ),
        "is_bf16_supported": lambda *_, **__: True,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    # Tensors of inference mode take no wrapper; functions were decorated with it long ago.
    entered: list[torch.no_grad] = []  # one within another

    def enter(_: object) -> None:
        entered.append(torch.no_grad())
        entered[-1].__enter__()

    patch.setattr(torch.inference_mode, "__enter__", enter)
    patch.setattr(torch.inference_mode, "__exit__", lambda _, *e: entered.pop().__exit__(*e))
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention)
    gpu = Gpu()
    _entered.append(gpu)
    try:
        with gpu:
            yield gpu
    finally:
        _entered.pop()


def _set_device(device: Any) -> None:
    if not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index, but got: {device}")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> Tensor:
    """As its definition says; the fused kernels of a device are not here."""
    if enable_gqa:
        shared = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(shared, 1) for heads in (key, value))
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attn_mask = ones.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(scores[:1, :1]).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
