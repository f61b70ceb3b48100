"""dotexport: narrow a trained model by optimal transport, export it to every runtime, prove it."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a wheel, targets/ and bench/ lie inside this folder. In a checkout they lie beside it.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "targets/__init__.py").is_file():
    __path__.append(str(_checkout))
