"""report.html: one self-contained page on what was made, what it costs and what it gains."""

from .page import render, write_report

__all__ = ["render", "write_report"]
