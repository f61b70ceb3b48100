"""K-quants: the layout, how near they come, where they are legal, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport import embedded
from dotexport.axes.plan import SizeOptions
from dotexport.exports.calibrating import Text
from dotexport.exports.exporting import export
from dotexport.exports.reference import Reference, compute_reference
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import find_family
from dotexport.models.shapes import read_sizes
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.planning import choose
from dotexport.storage import manifest

gguf: Any = pytest.importorskip("gguf")
from dotexport.targets.ggml_mixes import stored_as  # noqa: E402
from dotexport.targets.kquants import SUPERBLOCK, quantize  # noqa: E402
from dotexport.targets.llamacpp import run  # noqa: E402

Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
# Per format: groups, weights of one, the largest scale, the lowest level, levels; and whether it
# has offsets.
SHAPES = {
    gguf.GGMLQuantizationType.Q2_K: (16, 16, 15, 0, 4, True),
    gguf.GGMLQuantizationType.Q3_K: (16, 16, 31, -4, 8, False),
    Q4_K: (8, 32, 63, 0, 16, True),
    gguf.GGMLQuantizationType.Q5_K: (8, 32, 63, 0, 32, True),
    Q6_K: (16, 16, 127, -32, 64, False),
}
# KL to float32 that the embedded model keeps to, in nats: two or three times what was seen.
PRECISIONS = {"int6-k": 0.005, "int4-k": 0.05, "int3-k": 0.15, "int2-k": 1.5}
# Precision -> how a table, queries and ffn_down of rows of 96, 96 and 256 are stored.
STAND_INS = {
    "int6-k": ("Q8_0", "Q8_0", "Q6_K"),
    "int4-k": ("Q8_0", "Q5_0", "Q4_K"),
    "int3-k": ("Q8_0", "Q4_0", "Q4_K"),
    "int2-k": ("Q8_0", "Q4_0", "Q3_K"),
}
# Llama-3.1-8B, but for the sizes that each test gives.
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


def read_back(packed: Any, kind: Any) -> Any:
    return gguf.dequantize(packed, kind)


def random_rows(kind: str, shape: tuple[int, ...] = (6, 512)) -> Any:
    rng = np.random.default_rng(0)
    rows = {
        "normal": lambda: rng.normal(size=shape),
        "positive": lambda: rng.uniform(0.2, 1.0, size=shape),
        "negative": lambda: -rng.exponential(size=shape),
        "few": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.05),
        "steps": lambda: rng.normal(size=shape) * np.geomspace(1e-3, 1, shape[1]),
    }[kind]()
    return (0.02 * rows).astype(np.float32)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_the_format_can_hold_comes_back(kind: Any) -> None:
    rng = np.random.default_rng(0)
    groups, width, top, lowest, levels, offsets = SHAPES[kind]
    q = rng.integers(lowest, lowest + levels, size=(20, groups, width))
    q[..., 0], q[..., 1] = lowest, lowest + levels - 1
    scale = rng.integers(1, top + 1, size=(20, groups, 1))
    scale[:, 3] = top  # by which the shared float16 is known
    rows = np.float16(0.0013) * scale * q
    if offsets:
        offset = rng.integers(0, top + 1, size=(20, groups, 1))
        offset[:, 5] = top
        rows = rows - np.float16(0.017) * offset
    else:
        rows = rows * rng.choice([-1, 1], size=scale.shape)
    rows = rows.reshape(4, -1).astype(np.float32)
    # As many bits as float32 keeps in sums over a group.
    again = read_back(quantize(rows, kind), kind)
    np.testing.assert_allclose(again, rows, rtol=0, atol=1e-6 * np.abs(rows).max())


@pytest.mark.parametrize("rows", ["normal", "positive", "negative", "few", "steps"])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_weight_is_further_off_than_its_step(rows: str, kind: Any) -> None:
    _, group, top, _, count, offsets = SHAPES[kind]
    levels = count - 1
    x = random_rows(rows)
    error = np.abs(read_back(quantize(x, kind), kind) - x).reshape(-1, group)
    low, high = x.reshape(-1, group).min(1), x.reshape(-1, group).max(1)
    # A step of the group, were its scale its own, twice: rounding costs half of one, clipping what
    # the stretch leaves out (less than one), and scales of six bits 1/126 of the largest group, at
    # every level of it; fewer bits accordingly more.
    wide = np.maximum(high, 0) - np.minimum(low, 0)
    own = (wide if offsets else 2 * np.maximum(high, -low)) / levels
    largest = np.repeat(np.abs(x).reshape(-1, SUPERBLOCK).max(1), SUPERBLOCK // group)
    assert (error.max(1) <= 1.5 * own + 2 / top * largest).all()


@pytest.mark.parametrize("rows", ["normal", "positive", "few"])
def test_it_is_as_near_as_trying_scales_by_brute_force(rows: str) -> None:
    """Of single groups, whose scale then needs no rounding that other groups ask for."""
    for row in 50 * random_rows(rows, (8, 32)):  # whose scales float16 holds in eleven bits
        x = np.tile(row, 8)
        mine = np.square(read_back(quantize(x[None], Q4_K), Q4_K)[0, :32] - row).sum()
        best = brute_force(row)
        # 5 % for a search that looks at eleven widths, and what rounding of scales costs.
        width = max(row.max(), 0) - min(row.min(), 0)
        assert mine <= 1.05 * best + len(row) * np.square(2.0**-10 * width)


def brute_force(row_W: Any) -> float:
    """Least squared error over a fine grid of scales and offsets."""
    low, high = min(row_W.min(), 0), row_W.max()
    scale_S = max(high - low, 1e-30) / 15 * np.linspace(0.6, 1.1, 251)[:, None, None]
    offset_O = -low * np.linspace(0.6, 1.1, 126)[:, None]
    q_SOW = np.clip(np.rint((row_W + offset_O) / scale_S), 0, 15)
    return float(np.square(scale_S * q_SOW - offset_O - row_W).sum(-1).min())


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("kind", SHAPES)
def test_constant_rows_come_back(value: float, kind: Any) -> None:
    rows = np.full((2, 256), value, dtype=np.float32)
    # Three roundings to eleven bits at most.
    np.testing.assert_allclose(read_back(quantize(rows, kind), kind), rows, rtol=1.5e-3)


def test_it_loses_less_than_plain_blocks_of_its_size() -> None:
    x = random_rows("normal", (64, 1024))
    plain = gguf.GGMLQuantizationType.Q4_0
    errors = {
        kind: np.square(read_back(packed, kind) - x).mean()
        for kind, packed in ((plain, gguf.quantize(x, plain)), (Q4_K, quantize(x, Q4_K)))
    }
    assert errors[Q4_K] < 0.75 * errors[plain]


def test_rows_that_end_inside_a_superblock_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 256"):
        quantize(np.zeros((2, 320), dtype=np.float32), Q4_K)


# --- in a model


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose rows are 256 and 512 wide."""
    folder = tmp_path_factory.mktemp("k") / "out"
    specs = [f"gguf:{precision}" for precision in PRECISIONS]
    export(embedded.MODEL_DIR, specs, out=folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def reference(out: Path) -> Reference:
    return compute_reference(Checkpoint.open(out / "hf"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_in_k_quants_is_read_back(precision: str, out: Path, reference: Reference) -> None:
    folder = out / f"gguf-{precision}"
    parity = check(find_target("gguf"), precision, folder, reference, artifact=precision)
    assert parity.problems == ()
    assert parity.kl < PRECISIONS[precision]


@pytest.mark.llamacpp
@pytest.mark.parametrize("precision", PRECISIONS)
def test_llama_cpp_computes_with_our_k_quants(
    precision: str, out: Path, reference: Reference, llama_cpp: Path
) -> None:
    folder = out / f"gguf-{precision}"
    parity = run(llama_cpp, folder, precision, reference, artifact=precision)
    assert parity.problems == ()


def test_the_mix_is_that_of_q4_k_m(out: Path) -> None:
    tensors = gguf.GGUFReader(out / "gguf-int4-k" / "model.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q4_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # Of four layers, the third and the last: every third, and the last eighth.
    assert [kinds[f"blk.{n}.ffn_down.weight"] for n in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert [kinds[f"blk.{n}.attn_v.weight"] for n in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert {kinds[f"blk.{n}.attn_q.weight"] for n in range(4)} == {"Q4_K"}


def test_the_mixes_of_fewer_bits_are_those_of_q3_k_m_and_q2_k(out: Path) -> None:
    """Four layers, two query heads to a KV head."""
    kinds = {
        precision: {
            tensor.name: tensor.tensor_type.name
            for tensor in gguf.GGUFReader(out / f"gguf-{precision}" / "model.gguf").tensors
        }
        for precision in ("int3-k", "int2-k")
    }
    wanted = {"int3-k": ("Q3_K", "Q5_K", "Q4_K", "Q4_K"), "int2-k": ("Q2_K", *3 * ["Q3_K"])}
    for precision, (usual, first_values, downs, outputs) in wanted.items():
        found = kinds[precision]
        assert found["output.weight"] == "Q6_K"
        assert found["token_embd.weight"] == found["blk.1.attn_q.weight"] == usual
        assert found["blk.0.attn_v.weight"] == found["blk.1.attn_v.weight"] == first_values
        assert {found[f"blk.{n}.ffn_down.weight"] for n in range(4)} == {downs}
        assert {found[f"blk.{n}.attn_output.weight"] for n in range(4)} == {outputs}
    assert kinds["int3-k"]["blk.2.attn_v.weight"] == "Q4_K"


def test_values_that_many_heads_share_have_more_bits() -> None:
    types = [
        stored_as("blk.0.attn_v.weight", (64, 256), "int2-k", layers=4, shared=n, tied=False).name
        for n in (3, 4)
    ]
    assert types == ["Q3_K", "Q4_K"]


@pytest.fixture(scope="module")
def narrow_model(tiny_model: Callable[..., Path]) -> Path:
    """Rows of 96, and of 256 in its MLP's writer."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}
    return tiny_model(
        model_type="llama", **sizes, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def narrow(narrow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "out"
    specs = [f"gguf:{precision}" for precision in PRECISIONS]
    export(narrow_model, specs, out=folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def narrow_reference(narrow: Path) -> Reference:
    return compute_reference(Checkpoint.open(narrow / "hf"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_are_no_superblocks_are_stored_in_blocks(
    precision: str, narrow: Path, narrow_reference: Reference
) -> None:
    """In the types of llama.cpp's quantiser, but Q4_0 for its IQ4_NL and Q5_0 for its Q5_1; rows of
    256 stay what they were."""
    folder = narrow / f"gguf-{precision}"
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    head, query, down = STAND_INS[precision]
    assert kinds["token_embd.weight"] == head
    assert kinds["blk.0.attn_q.weight"] == query
    assert kinds["blk.0.ffn_down.weight"] == down
    parity = check(find_target("gguf"), precision, folder, narrow_reference, artifact=precision)
    assert parity.problems == ()


def test_stand_ins_are_told(
    narrow_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    find_target("gguf").write(Checkpoint.open(narrow_model), tmp_path, "int4-k")
    assert "19 of 22 matrices have rows that are no multiple of 256" in caplog.text
    assert "Q5_0, Q8_0 instead" in caplog.text


@pytest.mark.llamacpp
@pytest.mark.parametrize("precision", PRECISIONS)
def test_llama_cpp_computes_with_stand_ins(
    precision: str, narrow: Path, narrow_reference: Reference, llama_cpp: Path
) -> None:
    folder = narrow / f"gguf-{precision}"
    parity = run(llama_cpp, folder, precision, narrow_reference, artifact=precision)
    assert parity.problems == ()


def test_stand_ins_are_chosen_for_a_text_too(narrow_model: Path, tmp_path: Path) -> None:
    """Levels of Q5_0 and Q4_0 by GPTQ come out of the file as they were chosen."""

    def read(checkpoint: Checkpoint) -> Text:
        random = torch.Generator().manual_seed(0)
        windows_NL = torch.randint(checkpoint.config["vocab_size"], (8, 32), generator=random)
        return Text(windows_NL, {"text": "drawn", "tokens": windows_NL.numel()})

    export(narrow_model, ["gguf:int4-k", "gguf:int2-k"], out=tmp_path / "out", read=read)
    artifacts = manifest.read(tmp_path / "out")["artifacts"]
    for name in ("gguf-int4-k", "gguf-int2-k"):
        assert any("q_proj" in tensor for tensor in artifacts[name]["calibration"]["tensors"])


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", *PRECISIONS])
def test_a_file_takes_what_was_declared(precision: str, out: Path, tmp_path: Path) -> None:
    target, checkpoint = find_target("gguf"), Checkpoint.open(out / "hf")
    target.write(checkpoint, tmp_path, precision)
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    family = find_family(checkpoint.config)
    declared: Any = target
    said = declared.stored_bytes(family, read_sizes(family, checkpoint.config), precision)
    assert said == sum(tensor.n_bytes for tensor in tensors)


def test_plan_finds_sizes_that_k_quants_take() -> None:
    asked = SizeOptions(params="0.7x")
    choice = choose(LARGE, asked, Deployment(targets=("gguf:int4-k",)))
    after = choice.plan.after
    assert after.hidden_size % 256 == 0
    assert after.intermediate_size % 256 == 0
    one, two = choice.costs.artifacts["gguf-int4-k"]
    # llama.cpp's own Q4_K_M of this model has 4.92 GB, of 8.03e9 parameters.
    assert one == pytest.approx(4.92e9, rel=0.01)
    assert two / choice.plan.parameters_after == pytest.approx(one / 8.03e9, rel=0.02)


def test_a_budget_leaves_whole_superblocks_where_there_are_none_to_keep() -> None:
    """Nine heads of 64, as SmolLM2-135M has them: stored in blocks, and priced so."""
    config = {**LARGE, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    config |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    where = Deployment(targets=("gguf:int4-k", "gguf:int4"))
    costs = choose({**config, "num_hidden_layers": 30}, SizeOptions(params="0.8x"), where).costs
    # llama.cpp's own Q4_K_M of SmolLM2-135M has 98.9 MiB, its Q4_0 85.8 (in Q8_0 the table).
    assert costs.artifacts["gguf-int4-k"][0] == pytest.approx(98.9 * 2**20, rel=0.01)
