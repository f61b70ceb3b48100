"""dotexport: narrow a trained model by optimal transport, export it to every runtime, prove it."""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from dotexport.version import __version__

if _TYPE_CHECKING:
    from dotexport.app.shrink_options import ShrinkOptions
    from dotexport.app.shrinking import shrink
    from dotexport.axes.plan import SizeOptions
    from dotexport.exports.exporting import export
    from dotexport.exports.quality import evaluate
    from dotexport.exports.verifying import verify
    from dotexport.models.text_options import TextOptions
    from dotexport.narrowing.narrow_options import NarrowOptions
    from dotexport.sizes.budget import plan
    from dotexport.vocabulary.vocabulary_options import VocabularyOptions

# In a wheel, targets/ and bench/ lie inside this folder. In a checkout they lie beside it.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "targets/__init__.py").is_file():
    __path__.append(str(_checkout))

# Public names and where they live. They are imported when first asked for: torch takes seconds.
_HOMES = {
    "NarrowOptions": "narrowing.narrow_options",
    "ShrinkOptions": "app.shrink_options",
    "SizeOptions": "axes.plan",
    "TextOptions": "models.text_options",
    "VocabularyOptions": "vocabulary.vocabulary_options",
    "evaluate": "exports.quality",
    "export": "exports.exporting",
    "plan": "sizes.budget",
    "shrink": "app.shrinking",
    "verify": "exports.verifying",
}

__all__ = [
    "NarrowOptions",
    "ShrinkOptions",
    "SizeOptions",
    "TextOptions",
    "VocabularyOptions",
    "__version__",
    "evaluate",
    "export",
    "plan",
    "shrink",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_import_module(f"dotexport.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dotexport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
