"""Checkpoints are read lazily and written as they are made, as safetensors itself would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dotexport.models import checkpoint
from dotexport.models.checkpoint import INDEX, Checkpoint, CheckpointWriter, TensorSpec
from dotexport.models.finding import find_model

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 5), "a.bias": (3,), "b.weight": (4, 3), "scalar": (), "none": (0, 4)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def specs(values: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in values.items()}


def store(folder: Path, values: Mapping[str, torch.Tensor], *, shard: int = 1 << 30) -> None:
    writer = CheckpointWriter(folder, specs(values), max_shard_bytes=shard)
    for name in reversed(values):  # the order of writing is free
        writer.write(name, values[name])
    writer.finish()
    (folder / "config.json").write_text("{}")


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_what_was_streamed(tmp_path: Path, dtype: torch.dtype) -> None:
    values = tensors(dtype)
    store(tmp_path, values)
    assert equal(load_file(tmp_path / "model.safetensors"), values)


@pytest.mark.parametrize("shard", [1, 60, 1 << 30])
def test_shards_hold_every_tensor_once(tmp_path: Path, shard: int) -> None:
    values = tensors()
    store(tmp_path, values, shard=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    loaded = [load_file(file) for file in files]
    assert equal({name: part[name] for part in loaded for name in part}, values)
    assert sum(len(part) for part in loaded) == len(values)
    sizes = [sum(value.nbytes for value in part.values()) for part in loaded]
    assert all(size <= shard or len(part) == 1 for size, part in zip(sizes, loaded, strict=True))
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        held = {name: file.name for file, part in zip(files, loaded, strict=True) for name in part}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(sizes)
    else:
        assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("shard", [1, 1 << 30])
def test_the_reader_gives_what_was_written(tmp_path: Path, shard: int) -> None:
    values = tensors(torch.bfloat16)
    store(tmp_path, values, shard=shard)
    found = Checkpoint.open(tmp_path)
    assert found.specs == specs(values)
    assert equal({name: found.tensor(name) for name in found.files}, values)
    assert found.num_parameters == sum(value.numel() for value in values.values())
    assert found.num_bytes == 2 * found.num_parameters


def test_the_reader_gives_what_safetensors_wrote(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = Checkpoint.open(tmp_path)
    assert equal({name: found.tensor(name) for name in found.files}, values)


def test_opening_and_asking_for_shapes_reads_no_weights(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama("wide-heads"), tmp_path / "model")
    file = model / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))  # every value is NaN
    found = Checkpoint.open(model)
    assert found.specs["model.norm.weight"] == TensorSpec((48,), torch.float32)
    with pytest.raises(checkpoint.CheckpointError, match="NaN"):
        found.tensor("model.norm.weight")


def test_values_are_rounded_as_torch_rounds(tmp_path: Path) -> None:
    value = torch.randn(100, generator=torch.Generator().manual_seed(0))
    writer = CheckpointWriter(tmp_path, {"w": TensorSpec((100,), torch.bfloat16)})
    writer.write("w", value)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value.bfloat16())


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).T
    store(tmp_path, {"w": value})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value)


@pytest.mark.parametrize("length", range(1, 9))
def test_data_begins_where_eight_divides(tmp_path: Path, length: int) -> None:
    store(tmp_path, {"x" * length: torch.ones(2)})
    header = (tmp_path / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0


def test_what_was_announced_must_be_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, specs(tensors()))
    writer.write("a.bias", tensors()["a.bias"])
    with pytest.raises(ValueError, match=r"never written: \['a\.weight', 'b\.weight'"):
        writer.finish()
    with pytest.raises(ValueError, match="announced"):
        writer.write("a.weight", torch.zeros(5, 3))


def test_the_space_for_all_weights_is_taken_at_once(tmp_path: Path) -> None:
    values = {"w": torch.zeros(1 << 18)}
    CheckpointWriter(tmp_path, specs(values))
    taken = (tmp_path / "model.safetensors").stat()
    assert taken.st_blocks * 512 >= values["w"].nbytes


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    store(tmp_path, tensors())
    with pytest.raises(checkpoint.CheckpointError, match=r"no tensor 'c\.weight'.*download"):
        Checkpoint.open(tmp_path).tensor("c.weight")


def test_tokenizer_and_licence_travel_and_weights_do_not(tmp_path: Path) -> None:
    store(tmp_path, tensors())
    travel = ["LICENSE.txt", "generation_config.json", "merges.txt", "tokenizer.json", "vocab.json"]
    for name in [*travel, "README.md", "training_args.bin"]:
        (tmp_path / name).touch()
    (tmp_path / "tokenizer").mkdir()
    assert [file.name for file in Checkpoint.open(tmp_path).companions()] == travel


def test_an_output_stands_for_the_checkpoint_inside(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    assert find_model(str(tmp_path)) == tmp_path
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path / "hf"
