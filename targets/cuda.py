"""CUDA in onnxruntime: is it here, and did the work of a graph really go there?

onnxruntime falls back to the CPU without an error, as a whole where its CUDA library does not
load, and node by node where a kernel is missing. Both are looked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dotexport.errors import RuntimeMissingError

CUDA = "CUDAExecutionProvider"

# What computes on numbers of the model. Shapes and lengths stay on the CPU by design.
COMPUTES = {
    "Attention",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Sigmoid",
}

# float32 means float32: by default the tensor cores would multiply with 10 bits of mantissa.
OPTIONS = {"use_tf32": "0"}


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: GPUs it shows, and the newest CUDA it serves, such as (12, 4)."""

    num_devices: int
    cuda: tuple[int, int]


class Fault(NamedTuple):
    """What onnxruntime would need, and how to come by it."""

    need: str
    mend: str


def lacking() -> list[str]:
    """What keeps onnxruntime from CUDA here, each with what to do; empty: it loads."""
    seen = driver()
    if seen is None:
        return ["an NVIDIA GPU and its driver (libcuda is not here); use a machine with a GPU"]
    if seen.num_devices == 0:
        return ["a GPU: the NVIDIA driver shows none; check nvidia-smi and CUDA_VISIBLE_DEVICES"]
    return [f"{fault.need}; {fault.mend}" for fault in faults(seen)]


def faults(seen: Driver) -> list[Fault]:
    """What is wrong with onnxruntime on a machine whose driver shows a GPU."""
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        mend = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return [Fault("an onnxruntime with CUDA: this one is built without", mend)]
    built = _release(ort.cuda_version)
    if seen.cuda[0] < built[0]:
        need = (
            f"a driver for CUDA {_dotted(built)}, which onnxruntime {ort.__version__} is built "
            f"for: this one serves CUDA up to {_dotted(seen.cuda)}"
        )
        other = f"or install an onnxruntime-gpu that is built for CUDA {seen.cuda[0]}"
        return [Fault(need, f"update the NVIDIA driver, {other}")]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    reason = _load_error(Path(ort.__file__).parent / "capi")
    if reason is None:
        return []
    need = f"libraries of CUDA {_dotted(built)}: {CUDA} is listed and does not load ({reason})"
    return [Fault(need, "pip install 'onnxruntime-gpu[cuda,cudnn]'")]


def driver() -> Driver | None:
    """What the NVIDIA driver says of itself; None: there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return _ask(ctypes.CDLL(name))
    return None


def _ask(library: Any) -> Driver:
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))  # 12040 is CUDA 12.4
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return Driver(count.value, (version.value // 1000, version.value % 1000 // 10))


def _load_error(capi: Path) -> str | None:
    """Why the provider's library cannot be loaded, in the words of the loader; None: it can."""
    libraries = [capi / f"libonnxruntime_providers_{part}.so" for part in ("shared", "cuda")]
    try:
        for library in filter(Path.is_file, libraries):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


def _release(text: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) where there is none.

    >>> _release("13.0"), _release("")
    ((13, 0), (0, 0))
    """
    parts = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return (parts[0], parts[1]) if len(parts) == 2 else (0, 0)


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def require_cuda(options: Any, file: Path) -> Any:
    """A session whose every computing node is on CUDA.

    Raises:
        RuntimeMissingError: CUDA cannot be had here, or onnxruntime fell back, wholly or in part.
    """
    import onnxruntime as ort

    missing = lacking()
    if missing:
        raise RuntimeMissingError(f"{CUDA} cannot run here; it needs {'; '.join(missing)}")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [(CUDA, OPTIONS), "CPUExecutionProvider"]
    session = ort.InferenceSession(file, options, providers=providers)
    check_provider(session.get_providers())
    check_placement(placement(session))
    return session


def check_provider(providers: Iterable[str]) -> None:
    """Refuse a session that was asked for CUDA and has it not.

    Raises:
        RuntimeMissingError: it fell back.
    """
    got = list(providers)
    if CUDA not in got:
        raise RuntimeMissingError(
            f"asked onnxruntime for {CUDA}, got {', '.join(got)}: it fell back; "
            "`dotexport doctor` says what is wrong with CUDA here"
        )


def placement(session: Any) -> list[tuple[str, str]]:
    """(provider, operator) of every node of a session that recorded where it put them.

    Raises:
        RuntimeMissingError: an onnxruntime that cannot say it.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise RuntimeMissingError(
            "this onnxruntime cannot say on which provider nodes run, so that a fallback would go "
            "unseen; pip install -U onnxruntime-gpu"
        )
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]


def check_placement(placed: Iterable[tuple[str, str]]) -> None:
    """Refuse a session whose products, norms or attention are not on CUDA.

    Raises:
        RuntimeMissingError: naming the operators that fell back, or that none was placed there.
    """
    nodes = list(placed)
    astray = Counter((op, where) for where, op in nodes if op in COMPUTES and where != CUDA)
    if astray:
        listed = ", ".join(f"{n} {op} on {where}" for (op, where), n in sorted(astray.items()))
        raise RuntimeMissingError(
            f"onnxruntime left nodes of the graph off {CUDA}: {listed}; this build has no kernel "
            "for them at this precision: choose another precision, or pip install -U "
            "onnxruntime-gpu"
        )
    if not any(op in COMPUTES for _, op in nodes):
        raise RuntimeMissingError(
            f"onnxruntime placed no product of the graph on {CUDA}; "
            "export it again, or pip install -U onnxruntime-gpu"
        )
