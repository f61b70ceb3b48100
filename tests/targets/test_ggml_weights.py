"""What a GGUF file says itself, held against what it should say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

gguf: Any = pytest.importorskip("gguf")

from dotexport.targets import kquants  # noqa: E402
from dotexport.targets.ggml_weights import ERRORS, wrong_in_file  # noqa: E402

Values = NDArray[np.float32]
TRUE_RI: Values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
HEADER = {"llama.block_count": 2, "llama.rope.freq_base": 10000.0, "general.name": "model"}


def write(file: Path, kind: Any, values_RI: Values, **changes: Any) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    said = HEADER | changes
    writer.add_block_count(said["llama.block_count"])
    writer.add_rope_freq_base(said["llama.rope.freq_base"])
    writer.add_name(said["general.name"])
    quantize = kquants.quantize if kind in kquants.FORMATS else gguf.quantize
    writer.add_tensor("output.weight", quantize(values_RI, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def wrong(file: Path, told: Mapping[str, Any] = HEADER) -> list[str]:
    return wrong_in_file(file, told, [("output.weight", TRUE_RI)])


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: str(kind.name))
def test_what_rounding_alone_changed_is_right(kind: Any, tmp_path: Path) -> None:
    assert wrong(write(tmp_path / "m.gguf", kind, TRUE_RI)) == []


def scaled(values_RI: Values) -> Values:
    return values_RI * np.float32(0.99)  # 1 % more hides in Q4_K, whose rounding takes 0.4 %


def row_zeroed(values_RI: Values) -> Values:
    changed_RI = values_RI.copy()
    changed_RI[3] = 0
    return changed_RI


def rows_swapped(values_RI: Values) -> Values:
    return values_RI[[1, 0, *range(2, len(values_RI))]]


def small_row_lost(values_RI: Values) -> Values:
    changed_RI = values_RI.copy()
    changed_RI[5] = 0.1 * changed_RI[6]
    return changed_RI


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("spoil", [scaled, row_zeroed, rows_swapped, small_row_lost])
def test_one_percent_and_one_row_are_seen_in_every_precision(
    kind: Any, spoil: Callable[[Values], Values], tmp_path: Path
) -> None:
    spoiled_RI = spoil(TRUE_RI)
    if spoil is scaled and kind == gguf.GGMLQuantizationType.Q2_K:
        spoiled_RI = scaled(scaled(spoiled_RI))  # whose scales of four bits hide 1 %
    [said] = wrong(write(tmp_path / "m.gguf", kind, spoiled_RI))
    assert "output.weight" in said
    assert ("times the checkpoint's" in said) == (spoil is scaled and kind not in EXACT)


EXACT = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)  # their rows say it first


def test_a_row_of_hardly_anything_may_be_rounded_away(tmp_path: Path) -> None:
    true_RI = TRUE_RI.copy()
    true_RI[2] *= 1e-9
    file = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F16, true_RI)
    assert wrong_in_file(file, HEADER, [("output.weight", true_RI)]) == []


@pytest.mark.parametrize(
    ("key", "other"), [("llama.block_count", 3), ("llama.rope.freq_base", 10001.0)]
)
def test_a_number_of_the_header_is_seen(key: str, other: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, TRUE_RI, **{key: other})
    assert wrong(file) == [
        f"the header says {key} = {other!r}, and config.json means {HEADER[key]!r}"
    ]


def test_a_number_that_is_not_there_is_seen_and_a_name_is_free(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.F32
    file = write(tmp_path / "m.gguf", kind, TRUE_RI, **{"general.name": "other"})
    assert wrong(file) == []
    [said] = wrong(file, HEADER | {"llama.attention.head_count": 4})
    assert "llama.attention.head_count = None, and config.json means 4" in said
