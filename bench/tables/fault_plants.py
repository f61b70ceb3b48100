"""Faults planted into finished artifacts whose hashes then say that all is well.

Somebody who can change an artifact can change the manifest beside it; what is left is what the
artifact computes, and what its files say.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from dotexport import embedded
from dotexport.exports import verifying
from dotexport.exports.exporting import export
from dotexport.exports.reference import Reference, compute_reference
from dotexport.models.checkpoint import Checkpoint
from dotexport.storage import manifest

from .forked import Ending, forked

SPECS = (
    *("ort-cpu:fp32", "ort-cpu:int4", "onnx:fp32", "onnx:int8", "openvino:fp32", "openvino:int4"),
    *("gguf:fp16", "gguf:int8", "gguf:int4", "executorch:fp32"),
)
GGUF_NUMBERS = (
    *(("llama.rope.dimension_count", 0.5), ("llama.rope.freq_base", 1.01)),
    *(("llama.attention.layer_norm_rms_epsilon", 1.1), ("llama.context_length", 0.5)),
    *(("tokenizer.ggml.eos_token_id", 7), ("llama.attention.head_count_kv", 2)),
)


@dataclass(frozen=True)
class Plant:
    """A fault: what it is, and what it does to the folder of an artifact."""

    what: str
    spoil: Callable[[Path, random.Random], object]


@dataclass(frozen=True)
class Planted:
    """A fault in an artifact, and whether verification passed it."""

    artifact: str
    what: str
    passed: bool
    said: str

    @property
    def why(self) -> str:
        """What puts a fault that passes out of reach."""
        if "-int" in self.artifact and self.what.partition(": ")[2] in BYTES:
            return (
                "out of reach: weights that rounding to integers has moved all are held to a "
                "distance from torch, and 1 KB of them moves predictions less"
            )
        return "not seen"


def campaign(seed: int, scratch: Path) -> Iterator[Planted]:
    """Every fault of every artifact, one at a time."""
    out = scratch / "out"
    for spec in SPECS:
        if manifest.is_output(out):
            export(out, [spec])
        else:
            export(embedded.MODEL_DIR, [spec], out=out)
    reference = compute_reference(Checkpoint.open(out / "hf"))
    record = manifest.read(out)["artifacts"]
    for name in (n for n in record if n != "hf"):
        for number, plant in enumerate(plants(out / name)):
            rng = random.Random(f"{seed} {name} {number}")
            copy = scratch / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            for part in ("hf", name):
                shutil.copytree(out / part, copy / part)
            plant.spoil(copy / name, rng)
            files = manifest.hash_files(copy / name)
            size = sum(file["bytes"] for file in files.values())
            manifest.update(copy, artifacts={name: {**record[name], "files": files, "bytes": size}})
            ending = _verified(copy, name, reference)
            yield Planted(name, plant.what, ending.code == 0, ending.sentence)


def _verified(out: Path, name: str, reference: Reference) -> Ending:
    """As `dotexport verify` does; what torch computes is the same each time, so it is computed
    once."""
    entry = manifest.read(out)["artifacts"][name]
    target, precision = verifying.named(out, name, entry)
    checkpoint = Checkpoint.open(out / "hf")

    def look() -> None:
        chosen = verifying.chosen_for(checkpoint, entry)
        asked = target, precision, out / name, reference
        parity = verifying.check(*asked, artifact=name, chosen=chosen)
        parity = verifying.with_text(parity, target, out / name, checkpoint, chosen)
        verifying.require([parity])

    return forked(look)


def plants(folder: Path) -> list[Plant]:
    """What can be planted into an artifact of this kind."""
    return [
        Plant(f"{file.name}: {what}", partial(_spoil_in, file.relative_to(folder), spoil))
        for file in sorted(folder.rglob("*"))
        for what, spoil in _kinds(file.name).items()
    ]


def _spoil_in(
    name: Path, spoil: Callable[[Path, random.Random], object], folder: Path, rng: random.Random
) -> object:
    return spoil(folder / name, rng)


def _kinds(name: str) -> Mapping[str, Callable[[Path, random.Random], object]]:
    if name == "model.gguf":
        return GGUF
    if name.endswith(".onnx"):
        return ONNX
    if name in ("model.onnx.data", "model.bin", "openvino_model.bin", "model.pte"):
        return BYTES
    if name == "tokenizer.json":
        return {"two tokens swapped": _two_tokens_swapped, "a merge is lost": _a_merge_is_lost}
    if name == "generation_config.json":
        return {"another end": _set("eos_token_id", 7)}
    if name == "genai_config.json":
        return {
            "another end": _set("model.eos_token_id", 7),
            "another start": _set("model.bos_token_id", 7),
            "half of the context": _halved,
        }
    return {}


# In any file of numbers ---------------------------------------------------------------------------


def _blocks_zeroed(file: Path, rng: random.Random) -> None:
    _in_the_middle(file, rng, lambda block: bytes(len(block)))


def _blocks_turned(file: Path, rng: random.Random) -> None:
    _in_the_middle(file, rng, lambda block: block[::-1])


def _signs_flipped(file: Path, rng: random.Random) -> None:
    _in_the_middle(file, rng, lambda block: bytes(b ^ 0x80 for b in block))


def _in_the_middle(file: Path, rng: random.Random, change: Callable[[bytes], bytes]) -> None:
    """1 KB in the middle of the file, where weights are."""
    content = bytearray(file.read_bytes())
    at = 4 * rng.randrange(len(content) // 12, len(content) // 6)
    content[at : at + 1024] = change(bytes(content[at : at + 1024]))
    file.write_bytes(bytes(content))


BYTES = {
    "1 KB zeroed": _blocks_zeroed,
    "1 KB turned round": _blocks_turned,
    "signs of 1 KB": _signs_flipped,
}


# GGUF ---------------------------------------------------------------------------------------------


def _gguf_number(name: str, factor: float) -> Callable[[Path, random.Random], None]:
    def spoil(file: Path, rng: random.Random) -> None:
        import gguf

        reader = gguf.GGUFReader(file, "r+")
        field = reader.fields[name]
        part = field.parts[field.data[0]]
        part[0] = factor if factor >= 2 else part[0] * factor
        reader.data.flush()

    return spoil


def _gguf_tensor(
    kind: str, change: Callable[[Any, random.Random], None]
) -> Callable[[Path, random.Random], None]:
    def spoil(file: Path, rng: random.Random) -> None:
        import gguf

        reader = gguf.GGUFReader(file, "r+")
        change(rng.choice([t for t in reader.tensors if kind in t.name]), rng)
        reader.data.flush()

    return spoil


def _scales_off(tensor: Any, rng: random.Random) -> None:
    """Every block of the tensor is one percent larger."""
    if tensor.data.dtype == np.uint8:  # blocks of Q8_0 and Q4_0 begin with their scale in float16
        size = {34: 34, 18: 18}[_block_bytes(tensor)]
        blocks = tensor.data.reshape(-1, size)
        scales = blocks[:, :2].copy().view(np.float16) * np.float16(1.01)
        blocks[:, :2] = scales.view(np.uint8)
    else:
        tensor.data[...] = (tensor.data.astype(np.float32) * 1.01).astype(tensor.data.dtype)


def _block_bytes(tensor: Any) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])


def _rows_swapped(tensor: Any, rng: random.Random) -> None:
    one, two = rng.sample(range(len(tensor.data)), 2)
    tensor.data[[one, two]] = tensor.data[[two, one]]


def _row_zeroed(tensor: Any, rng: random.Random) -> None:
    tensor.data[rng.randrange(len(tensor.data))] = 0


GGUF = {
    **{f"{name} is {factor:g}": _gguf_number(name, factor) for name, factor in GGUF_NUMBERS},
    "1 % in the scales of a matrix": _gguf_tensor("ffn_down.weight", _scales_off),
    "1 % in a norm": _gguf_tensor("attn_norm.weight", _scales_off),
    "two rows of a matrix swapped": _gguf_tensor("attn_v.weight", _rows_swapped),
    "a row of a matrix zeroed": _gguf_tensor("ffn_up.weight", _row_zeroed),
    "two rows of the table swapped": _gguf_tensor("token_embd.weight", _rows_swapped),
    **BYTES,
}


# ONNX ---------------------------------------------------------------------------------------------


def _onnx_graph(
    change: Callable[[Any, random.Random], None],
) -> Callable[[Path, random.Random], None]:
    def spoil(file: Path, rng: random.Random) -> None:
        import onnx

        model = onnx.load(file, load_external_data=False)
        change(model, rng)
        onnx.save(model, file)

    return spoil


def _epsilon(factor: float) -> Callable[[Any, random.Random], None]:
    def change(model: Any, rng: random.Random) -> None:
        found = [
            attribute
            for node in model.graph.node
            for attribute in node.attribute
            if attribute.name == "epsilon"
        ]
        if found:
            found[rng.randrange(len(found))].f *= factor
            return
        # What is far below that keeps a division from zero, and no activation comes near it.
        small = [t for t in model.graph.initializer if 1e-12 < _single(t) < 1e-3]
        chosen = rng.choice(small)
        _store(chosen, np.array(_single(chosen) * factor, np.float32).reshape(tuple(chosen.dims)))

    return change


def _single(tensor: Any) -> float:
    import onnx

    if tensor.data_location or np.prod(tensor.dims, dtype=int) != 1 or tensor.data_type != 1:
        return 0.0
    return float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])


def _store(tensor: Any, values: Any) -> None:
    import onnx

    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _node_skipped(model: Any, rng: random.Random) -> None:
    """An input of an addition or product changes places with that of another one."""
    adds = [n for n in model.graph.node if n.op_type in ("Add", "Mul") and len(n.input) == 2]
    # In a product of products, nothing would change.
    apart = [
        (one, two)
        for one, two in permutations(adds, 2)
        if one.input[1] != two.input[1]
        and not {*one.output, *two.output} & {*one.input, *two.input}
    ]
    one, two = rng.choice(apart)
    one.input[1], two.input[1] = two.input[1], one.input[1]


ONNX = {
    "ten times an epsilon": _onnx_graph(_epsilon(10.0)),
    "10 % in an epsilon": _onnx_graph(_epsilon(1.1)),
    "two nodes read each other's input": _onnx_graph(_node_skipped),
}


# Text ---------------------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Callable[[Path, random.Random], None]:
    def spoil(file: Path, rng: random.Random) -> None:
        document = json.loads(file.read_text("utf-8"))
        place = document
        *parents, key = path.split(".")
        for parent in parents:
            place = place[parent]
        place[key] = value
        file.write_text(json.dumps(document), encoding="utf-8")

    return spoil


def _halved(file: Path, rng: random.Random) -> None:
    document = json.loads(file.read_text("utf-8"))
    document["model"]["context_length"] //= 2
    document["search"]["max_length"] //= 2
    file.write_text(json.dumps(document), encoding="utf-8")


def _two_tokens_swapped(file: Path, rng: random.Random) -> None:
    document = json.loads(file.read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    one, two = (token for token in ("e", "t"))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(document), encoding="utf-8")


def _a_merge_is_lost(file: Path, rng: random.Random) -> None:
    document = json.loads(file.read_text("utf-8"))
    del document["model"]["merges"][rng.randrange(50)]
    file.write_text(json.dumps(document), encoding="utf-8")
