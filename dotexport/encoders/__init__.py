"""Text encoders: BERT, RoBERTa, XLM-R, DistilBERT, ModernBERT and DeBERTa, plain folders and
sentence-transformers'.

A folder goes in, OUT/hf of the same stock class comes out with fewer neurons and layers; what
sentence-transformers keeps beside the weights is carried over byte by byte.
"""

from __future__ import annotations

from importlib import import_module as _import_module

# Public names and where they live; torch and transformers take seconds to import.
_HOMES = {
    "ShrinkOptions": "encoder_options",
    "evaluate": "encoder_quality",
    "shrink": "encoder_shrinking",
}

__all__ = ["ShrinkOptions", "evaluate", "shrink"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_import_module(f"dotexport.encoders.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dotexport.encoders' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
