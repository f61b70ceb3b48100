"""What the device can do at best, measured: memory bandwidth by array size, and matrix rates.

The kernels are torch's, on as many threads as the workload has. Bandwidth is that of the fastest of
a sum and a matrix-vector product (reads, as a decoded token reads weights) and STREAM's triad
(McCalpin, 1995). It is measured at the models' own sizes as well, because what fits into the last
cache is not bound by memory.

Shapes: R rows and C columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

SECONDS = 0.15  # of each kernel
LEAST_RUNS = 3
COLUMNS = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
EDGE_ON_CUDA = 8192
UNKNOWN_CACHE = 32 << 20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure(
    device: str, threads: int | None, sizes: Sequence[int], numbers: Sequence[str]
) -> dict[str, Any]:
    """Rates of one moment.

    Args:
        device: "cpu" or "cuda".
        threads: of the CPU.
        sizes: bytes of the arrays to read; one far above the last cache is added.
        numbers: kinds of numbers to multiply matrices of.

    Returns:
        memory: (bytes, bytes per second) by rising size; arithmetic: operations per second by
        kind of number, None where torch has no such product here.
    """
    if threads:
        torch.set_num_threads(threads)
    most = _most_bytes(device)
    wanted = sorted({min(size, most) for size in (*sizes, _far_above_cache(device))})
    return {
        "memory": [[size, bandwidth(size, device)] for size in wanted],
        "arithmetic": {number: matrix_rate(number, device) for number in numbers},
    }


def bandwidth(num_bytes: int, device: str = "cpu") -> float:
    """Bytes per second of the fastest kernel that goes over so many bytes again and again."""
    rows = max(1, num_bytes // (4 * COLUMNS))
    matrix_RC = torch.ones(rows, COLUMNS, device=device)
    vector_C = torch.ones(COLUMNS, device=device)
    third = max(1, matrix_RC.numel() // 3)
    one, two, out = matrix_RC.view(-1)[: 3 * third].view(3, third)
    kernels: list[tuple[Callable[[], object], int]] = [
        (matrix_RC.sum, matrix_RC.numel()),
        (lambda: matrix_RC.mv(vector_C), matrix_RC.numel()),
        (lambda: torch.add(one, two, alpha=0.5, out=out), 3 * third),
    ]
    return max(4 * numbers / _seconds(kernel, device) for kernel, numbers in kernels)


def matrix_rate(number: str, device: str = "cpu") -> float | None:
    """Operations per second of a large square product; None where torch has none here."""
    edge = _edge(device)
    square = torch.ones(edge, edge, device=device).to(DTYPES[number])
    # torch has no public name for the product of 8-bit integers.
    product = torch._int_mm if number == "int8" else torch.mm
    try:
        seconds = _seconds(lambda: product(square, square), device)
    except RuntimeError:
        return None
    return 2 * edge**3 / seconds


def _seconds(kernel: Callable[[], object], device: str) -> float:
    """Shortest time of one call, as a limit has to be; on CUDA of a batch of calls, for one launch
    takes longer."""
    calls = 10 if device == "cuda" else 1
    _timed(kernel, device, 1)
    times: list[float] = []
    started = perf_counter()
    while len(times) < LEAST_RUNS or perf_counter() - started < SECONDS:
        times.append(_timed(kernel, device, calls))
    return min(times)


def _timed(kernel: Callable[[], object], device: str, calls: int) -> float:
    started = perf_counter()
    for _ in range(calls):
        kernel()
    if device == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - started) / calls


def _edge(device: str) -> int:
    """Of square matrices that keep all threads busy for some milliseconds."""
    if device == "cuda":
        return EDGE_ON_CUDA
    return 512 * math.ceil(math.sqrt(torch.get_num_threads()))


def _far_above_cache(device: str) -> int:
    return 1 << 30 if device == "cuda" else 8 * last_level_cache()


def _most_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] // 8)
    return int(psutil.virtual_memory().available // 8)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, where Linux says them."""
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max((_bytes(size) for size in sizes), default=0) or UNKNOWN_CACHE


def _bytes(text: str) -> int:
    """
    >>> _bytes("32768K"), _bytes("32M")
    (33554432, 33554432)
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
