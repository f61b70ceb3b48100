"""Calibration text, under the name that it is known by outside; it lives in models/."""

from __future__ import annotations

from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import token_windows

__all__ = ["TextOptions", "token_windows"]
