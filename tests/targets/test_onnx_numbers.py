"""Epsilons and rotary tables of an ONNX graph, read where logits would not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx: Any = pytest.importorskip("onnx")

from dotexport.targets.configs import frequencies  # noqa: E402
from dotexport.targets.onnx_numbers import wrong_epsilons, wrong_tables  # noqa: E402

CONFIG = {"rms_norm_eps": 1e-6, "head_dim": 16, "rope_theta": 5000.0}
CONTEXT = 300


def graph(
    file: Path,
    *,
    attribute: float = 1e-6,
    added: float = 1e-6,
    tables: dict[str, Any] | None = None,
) -> Path:
    """A norm of one operator, one of its parts, and the tables."""
    make, values = onnx.helper, onnx.numpy_helper.from_array
    nodes = [
        make.make_node("Norm", ["x", "g"], ["y"], name="whole", domain="a", epsilon=attribute),
        make.make_node("ReduceMean", ["y"], ["mean"], name="mean"),
        make.make_node("Add", ["mean", "eps"], ["sum"], name="parts"),
        make.make_node("Add", ["sum", "other"], ["z"], name="something else"),
    ]
    scalars = {"eps": np.float32(added), "other": np.float32(0.5)}
    stored = [values(np.asarray(v), name) for name, v in {**scalars, **(tables or {})}.items()]
    ports = [make.make_tensor_value_info(n, 1, [1]) for n in ("x", "g", "z")]
    onnx.save(make.make_model(make.make_graph(nodes, "g", ports[:2], ports[2:], stored)), file)
    return file


def test_epsilons_are_read_as_attributes_and_as_constants(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    assert wrong_epsilons(graph(file), CONFIG) == []
    for changes, name in (({"attribute": 1.1e-6}, "whole"), ({"added": 1.1e-6}, "parts")):
        [said] = wrong_epsilons(graph(file, **changes), CONFIG)  # type: ignore[arg-type]
        assert said == (
            f"1 norms of the graph have another epsilon than config.json's 1e-06 ({name}: 1.1e-06)"
        )


def rotary(**changes: float) -> dict[str, Any]:
    frequencies_F, _ = frequencies(CONFIG | changes, "default")
    angles_TF = np.arange(CONTEXT)[:, None] * frequencies_F
    tables = {"cos_cache": np.cos(angles_TF), "sin_cache": np.sin(angles_TF)}
    return {name: table.astype(np.float32) for name, table in tables.items()}


def found(file: Path, tables: dict[str, Any], context: int = CONTEXT) -> list[str]:
    return wrong_tables(graph(file, tables=tables), *frequencies(CONFIG, "default"), context)


def test_tables_hold_the_angle_of_every_position(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    assert found(file, rotary()) == []
    halves = {name: table.astype(np.float16) for name, table in rotary().items()}
    assert found(file, halves) == []
    assert found(file, {}) == []
    assert "off at position 2" in found(file, rotary(rope_theta=5001.0))[0]  # near the end
    assert "the context has 600 positions of 8" in found(file, rotary(), 600)[0]


def test_the_last_rows_of_a_table_are_looked_at(tmp_path: Path) -> None:
    tables = rotary()
    tables["sin_cache"][-40:] = 0
    [said] = found(tmp_path / "m.onnx", tables)
    assert said.startswith("sin_cache is ")
