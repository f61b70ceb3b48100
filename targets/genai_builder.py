"""Whether onnxruntime-genai's model builder can run on the transformers that is installed.

It imports model classes by name, new ones in every release, and declares no version: without this,
an export would end in its ImportError.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

PACKAGE = "onnxruntime_genai"


@cache
def builder_problems() -> list[str]:
    """What to install so that the builder runs; empty: it does."""
    import transformers  # not at the top: a process that measures an artifact needs none

    unknown = sorted(_imported(_sources()) - set(dir(transformers)))
    if not unknown:
        return []
    return [
        f"a transformers with {', '.join(unknown)}: the model builder of onnxruntime-genai imports "
        f"that, and transformers {transformers.__version__} lacks it (pip install -U transformers)"
    ]


def _sources() -> list[Path]:
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return sorted(Path(next(iter(places))).glob("models/builders/*.py")) if places else []


def _imported(files: list[Path]) -> set[str]:
    """Names that the top level of these files imports from transformers."""
    return {
        name.name
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
        for name in node.names
    }
