"""Layers of a model compiled by torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from dotexport.errors import RuntimeMissingError


def compile_layers(model: Any) -> None:
    """One layer after another: all take what was compiled for the first."""
    for layer in model.get_decoder().layers:
        layer.compile()


def check_compiler(device: torch.device) -> None:
    """Compiles one sine.

    Raises:
        RuntimeMissingError: this machine lacks what torch.compile needs.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, of which few are public
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RuntimeMissingError(
            f"--heal-compile: torch.compile does not work for {device} here: {said}; install a C++ "
            "compiler (for a GPU, Triton), or leave the flag out"
        ) from error
