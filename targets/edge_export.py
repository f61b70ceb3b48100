"""Runs litert-torch's exporter, in a process of its own: python edge_export.py SETTINGS.

It registers attention and replaces parts of transformers when it is imported. Its wheel (0.10.0)
asks for the flatbuffer schema under TensorFlow's name and does not bring TensorFlow; the same
schema comes with ai-edge-litert, and is given that name while the exporter is imported.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

SCHEMA = "tensorflow.lite.python.schema_py_generated"


def exporter() -> Any:
    import_module("transformers")  # looks for TensorFlow, and must not find that name
    import_module("torch._dynamo")
    parents = {name: ModuleType(name) for name in ("tensorflow", "tensorflow.lite")}
    parent: Any = ModuleType("tensorflow.lite.python")
    parent.schema_py_generated = import_module("ai_edge_litert.schema_py_generated")
    named = {**parents, parent.__name__: parent, SCHEMA: parent.schema_py_generated}
    sys.modules.update(named)
    try:
        return import_module("litert_torch.generative.export_hf.export")
    finally:
        for name in named:
            del sys.modules[name]


if __name__ == "__main__":
    exporter().export(**json.loads(sys.argv[1]))
