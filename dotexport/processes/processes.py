"""Processes that compute one thing together, each with its share of the text.

All of them walk through the same steps. What is a sum over the text is added up (`sum`); what is
decided from such sums is decided by the first of them, and the others are told (`agreed`). So all
have the same weights, to the bit, whatever machines they run on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from dotexport.errors import DotexportError, LostProcessError, RuntimeMissingError, UsageError
from dotexport.processes.parcels import packed, unpacked
from dotexport.processes.torchrun import Started, speak

T = TypeVar("T")
X = TypeVar("X")

# Others wait while one samples text or solves: an end that is not heard of is torchrun's to find.
PATIENCE = timedelta(days=7)
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """One process that computes alone: there is nothing to add, and nobody to ask.

    Attributes:
        rank: its number among all.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it decides, writes and speaks."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Add up, in place, what each process has."""

    def largest(self, tensor: Tensor) -> None:
        """Leave, in place, the largest that any process has."""

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all."""
        return make()

    def handed_on(self, items: Iterable[T]) -> Iterator[T]:
        """What the first process comes by, one after another, for all; no item is None."""
        yield from items

    def each(self, function: Callable[[X], T], items: Sequence[X]) -> list[T]:
        """A function of each of these, for all; every process computes some."""
        return [function(item) for item in items]

    def computing(self) -> AbstractContextManager[None]:
        """A block in which torch has processes wait for each other.

        Raises:
            LostProcessError: one of them has gone.
        """
        return nullcontext()

    def tell(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the others call a function of a module with themselves and these arguments."""

    def follow(self) -> None:
        """Do what the first process tells, until it has nothing more."""


ALONE = Processes()


@dataclass(frozen=True, kw_only=True)
class Several(Processes):
    """One of several that have met.

    Attributes:
        device: where it computes.
        store: what they have in common besides messages; torchrun keeps it.
    """

    device: torch.device
    store: Store

    def sum(self, *tensors: Tensor) -> None:
        """All in one message where they are of one dtype: waiting takes longer than adding."""
        with _answered():
            whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(whole)
        parts = whole.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def largest(self, tensor: Tensor) -> None:
        with _answered():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def agreed(self, make: Callable[[], T]) -> T:
        return self._from(0, make() if self.leads else None)  # type: ignore[return-value]

    def handed_on(self, items: Iterable[T]) -> Iterator[T]:
        left = iter(items)
        while (item := self.agreed(lambda: next(left, None))) is not None:
            yield item

    def each(self, function: Callable[[X], T], items: Sequence[X]) -> list[T]:
        mine = [function(item) for item in items[self.rank :: self.size]]
        given = ((n % self.size, n // self.size) for n in range(len(items)))
        return [self._from(by, mine[n] if by == self.rank else None) for by, n in given]  # type: ignore[misc]

    def computing(self) -> AbstractContextManager[None]:
        return _answered(of=BACKENDS)

    def tell(self, function: Callable[..., object], *arguments: Any) -> None:
        assert self.leads
        self._from(0, (function, arguments))

    def follow(self) -> None:
        while (told := self._from(0, None)) is not None:
            function, arguments = told
            function(self, *arguments)

    def part(self) -> None:
        """The end of what is done together, which the first process finds."""
        if self.leads:
            self._from(0, None)

    @cached_property
    def fails_first(self) -> bool:
        """Whether this process, which fails, is the first to: others do because it left."""
        key = f"dotexport-failed-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            return bool(self.store.add(key, 1) == 1)
        except RuntimeError:  # whoever kept it has gone
            return self.leads

    def _from(self, by: int, value: T | None) -> T | None:
        """What process number `by` has."""
        words, tensors = packed(value) if by == self.rank else ("", [])
        looks = [(list(t.shape), str(t.dtype), t.device.type) for t in tensors]
        words, looks = json.loads(self._words(by, json.dumps([words, looks])))
        if by != self.rank:
            tensors = [self._room(*look) for look in looks]
        for tensor in tensors:
            with _answered():  # as bytes: not every backend knows every dtype
                whole = tensor.detach().contiguous().reshape(-1)
                dist.broadcast(whole.view(torch.uint8), by)
        return value if by == self.rank else unpacked(words, tensors)

    def _room(self, shape: list[int], dtype: str, kind: str) -> Tensor:
        """For a tensor that is to come, on a device of this kind."""
        device = self.device if kind == self.device.type else torch.device(kind)
        return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)

    def _words(self, by: int, said: str) -> str:
        """Words of process number `by`. They lie on the host, where waiting costs nothing."""
        mine = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)
        count = torch.tensor([len(mine)])
        with _answered():
            dist.broadcast(count, by)
            letters = mine if by == self.rank else torch.empty(int(count), dtype=torch.uint8)
            dist.broadcast(letters, by)
        return letters.numpy().tobytes().decode()


@contextmanager
def _answered(of: Sequence[str] = ("",)) -> Iterator[None]:
    """Whoever is waited for is there.

    Args:
        of: an error with one of these words is about that.

    Raises:
        LostProcessError: it has gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in of):
            raise
        raise LostProcessError(
            f"another process ended ({str(error).strip().splitlines()[0]}), and this one cannot go "
            "on without its share of the text; torchrun says which. Start the same command again"
        ) from error


@contextmanager
def met(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone; inside, they can be told things.

    One message is told of a failure, by the process that failed first.

    Raises:
        UsageError, RuntimeMissingError: they cannot compute on `--device`.
    """
    started = Started.here()
    if started.size == 1:
        yield ALONE
        return
    place = own_device(device, started)
    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    group = Several(rank=rank, size=size, device=place, store=store)
    try:
        yield group
        group.part()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and group.leads:
            raise
        if not isinstance(error, Exception) or not group.fails_first:
            code = 130 if isinstance(error, KeyboardInterrupt) else DotexportError.exit_code
            raise SystemExit(getattr(error, "exit_code", code)) from error
        if not group.leads:
            speak(f"process {rank} of {size}:")
        raise
    dist.destroy_process_group()


def own_device(name: str, started: Started) -> torch.device:
    """Of one of several processes: a GPU of its own each, or the CPU.

    Raises:
        UsageError: one GPU for all was asked for.
        RuntimeMissingError: there is none for this process, or nothing to add up with.
    """
    if name.startswith("cuda:"):
        raise UsageError(
            f"--device {name} is one GPU for {started.size} processes; give --device cuda, and "
            "each takes one of its own, or cpu"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if started.local >= (count := torch.cuda.device_count()):
        raise RuntimeMissingError(
            f"process {started.local} of this machine finds {count} CUDA devices; start as many "
            "processes as there are, or give --device cpu"
        )
    if not dist.is_nccl_available():
        raise RuntimeMissingError(
            "this torch has no NCCL, by which GPUs add up; install one that has, or give "
            "--device cpu"
        )
    torch.cuda.set_device(started.local)
    return torch.device("cuda", started.local)
