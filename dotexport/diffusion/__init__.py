"""Diffusion pipelines: one-shot pruning with Optimal Brain Surgeon, export, measuring.

`from dotexport.diffusion import PrunedSD3Transformer2DModel` (or any other `Pruned...`) gives the
class that loads a pruned denoiser; see carrier.py.
"""

from __future__ import annotations

from importlib import import_module as _import_module

# Public names and where they live; diffusers and torch take seconds to import.
_HOMES = {
    "ShrinkOptions": "pipeline_options",
    "evaluate": "evaluating",
    "export": "onnx_folder",
    "shrink": "pipeline_shrinking",
    "verify": "onnx_folder",
}

__all__ = ["ShrinkOptions", "evaluate", "export", "shrink", "verify"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_import_module(f"dotexport.diffusion.{_HOMES[name]}"), name)
    if name.startswith("Pruned"):
        return getattr(_import_module("dotexport.diffusion.carrier"), name)
    raise AttributeError(f"module 'dotexport.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
