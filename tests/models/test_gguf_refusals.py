"""GGUF files that are damaged, truncated, or no model of ours: refused, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.errors import CheckpointError, DotexportError, UnsupportedModelError
from dotexport.models.finding import find_model

gguf: Any = pytest.importorskip("gguf")


def copied(file: Path, out: Path, drop: tuple[str, ...] = (), **fields: Any) -> Any:
    """What writes a copy of a file with other values in its header; None leaves a key out."""
    reader = gguf.GGUFReader(file)
    arch = fields.get("arch", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, arch)
    changed = {key: value for key, value in fields.items() if key != "arch"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for name, value in changed.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return writer


@pytest.fixture(scope="module")
def file(gemma: Callable[[str], tuple[Path, Path]]) -> Path:
    return gemma("gemma2")[1]


REFUSED = [
    ({"arch": "mamba"}, UnsupportedModelError, "'mamba'; dotexport reads llama, granite, qwen2"),
    ({"general.type": "adapter"}, UnsupportedModelError, "holds no model but a adapter"),
    ({"split.count": 3}, UnsupportedModelError, "one of 3 parts; join them"),
    ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "kind 'bert', which cannot be"),
    ({"tokenizer.ggml.model": None}, UnsupportedModelError, "kind None, which cannot be rebuilt"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": None}, UnsupportedModelError, "2024"),
    (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "klingon"},
        UnsupportedModelError,
        "'klingon' does, which is not known",
    ),
    ({"tokenizer.ggml.eos_token_id": 301}, CheckpointError, "eos_token_id = 301"),
    ({"tokenizer.ggml.tokens": ["a"]}, CheckpointError, "1 tokens, 300 kinds"),
    ({"gemma2.expert_count": 8}, UnsupportedModelError, "mixture of experts"),
    ({"gemma2.block_count": None}, CheckpointError, "does not say gemma2.block_count"),
    ({"gemma2.block_count": "two"}, CheckpointError, "cannot be read as GGUF .TypeError"),
    ({"gemma2.block_count": 2_000_000_000}, CheckpointError, "more layers than any model"),
    ({"gemma2.attention.head_count": 0}, CheckpointError, "cannot be read as GGUF .ZeroDivision"),
    ({"gemma2.block_count": 1}, CheckpointError, "beside what its sizes call for"),
    ({"gemma2.block_count": 3}, CheckpointError, "lacks blk.2"),
    ({"gemma2.feed_forward_length": [256, 128]}, UnsupportedModelError, "layers of different"),
    ({"gemma2.feed_forward_length": 128}, CheckpointError, "where the sizes of the file call for"),
    ({"gemma2.attention.value_length": 32}, UnsupportedModelError, "different widths"),
    ({"gemma2.rope.dimension_count": 32}, UnsupportedModelError, "turns 32 of the 64"),
    ({"gemma2.rope.scaling.type": "longrope"}, UnsupportedModelError, "by 'longrope'"),
    ({"drop": ("token_embd.weight",)}, CheckpointError, "lacks token_embd.weight"),
    ({"drop": ("blk.1.ffn_up.weight",)}, CheckpointError, "lacks blk.1.ffn_up.weight"),
]


@pytest.mark.parametrize(("fields", "error", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_no_whole_model_of_ours_is_refused(
    fields: dict[str, Any],
    error: type[DotexportError],
    words: str,
    file: Path,
    closed: Callable[[Any], Path],
    own_cache: Path,
    tmp_path: Path,
) -> None:
    changed = closed(copied(file, tmp_path / "changed.gguf", **fields))
    with pytest.raises(error, match=words):
        find_model(str(changed))
    assert not list(own_cache.rglob("*.json"))


def test_a_copy_with_the_same_header_is_read(
    file: Path, closed: Callable[[Any], Path], tmp_path: Path
) -> None:
    """The tests above would pass with copies that nobody could read."""
    assert find_model(str(closed(copied(file, tmp_path / "same.gguf")))).is_dir()


def test_a_truncated_file_is_refused_wherever_it_ends(
    file: Path, own_cache: Path, tmp_path: Path
) -> None:
    content = file.read_bytes()
    starts = {int(tensor.data_offset) for tensor in gguf.GGUFReader(file).tensors}
    ends = {*range(0, 200, 7), *range(200, min(starts), 499), *starts, len(content) - 1}
    for end in ends:
        (tmp_path / "short.gguf").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"is no GGUF file|the file ends before what"):
            find_model(str(tmp_path / "short.gguf"))
    assert not list(own_cache.rglob("*.json"))


def test_damaged_bytes_are_refused_or_change_what_they_are_of_alone(
    file: Path, tmp_path: Path
) -> None:
    content, rng = file.read_bytes(), np.random.default_rng(0)
    header = min(int(tensor.data_offset) for tensor in gguf.GGUFReader(file).tensors)
    refused = []
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, header, 2):
            damaged[place] = int(rng.choice([0, 255, int(rng.integers(256))]))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            find_model(str(tmp_path / "damaged.gguf"), config_only=True)
        except DotexportError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert [said for said in refused if "damaged.gguf" not in said] == []


def test_nan_in_a_tensor_is_refused(file: Path, own_cache: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    at = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    content[at.data_offset : at.data_offset + 2] = np.float16("nan").tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight .* holds NaN"):
        find_model(str(tmp_path / "nan.gguf"))
    assert not list(own_cache.rglob("*.json"))
