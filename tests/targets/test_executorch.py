"""The ExecuTorch target: what only it has to do."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dotexport.errors import CheckpointError, UsageError
from dotexport.exports.target import find_target
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint

portable_lib: Any = pytest.importorskip("executorch.extension.pybindings.portable_lib")


def plain(exported: Any) -> Path:
    """The float32 artifact of one tiny model."""
    return program(exported("wide-heads", "executorch")).parent


def program(out: Path, precision: str = "fp32") -> Path:
    return out / f"executorch-{precision}" / "model.pte"


def weights(out: Path, name: str) -> np.ndarray:
    return np.array(Checkpoint.open(out / "hf").tensor(name).float().numpy())


def test_the_weights_take_what_their_precision_says(exported: Any) -> None:
    out = exported("wide-heads", "executorch")
    parameters = Checkpoint.open(out / "hf").num_parameters
    stored = {p: program(out, p).stat().st_size for p in ("fp32", "int4")}
    # The graph itself takes some 50 kB; weights kept twice would take 400.
    assert 4 * parameters < stored["fp32"] < 4 * parameters + 100_000
    # Rows of 48 and 88 are no multiple of 32 and take 8 bits, as the table does.
    assert stored["int4"] < 1.1 * parameters + 100_000


@pytest.mark.parametrize("scale", [1.0, 6.9])
def test_a_rounded_table_says_what_its_class_says_within_half_a_step(scale: float) -> None:
    """A class may scale what it looks up, as Gemma 3's does; a token of zeros stays one."""
    from dotexport.targets.phone import RoundedTable

    class Scaled(torch.nn.Embedding):
        def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens_BL) * scale

    torch.manual_seed(0)
    table = Scaled(90, 48)
    tokens_BL = torch.tensor([[3, 89, 0], [3, 7, 8]])
    with torch.no_grad():
        table.weight[7] = 0
        said_BLD, found_BLD = table(tokens_BL), RoundedTable(table)(tokens_BL)
    step_BL1 = said_BLD.abs().amax(-1, keepdim=True) / 127
    assert ((found_BLD - said_BLD).abs() <= 0.501 * step_BL1).all()
    assert not torch.equal(found_BLD, said_BLD)


def test_a_tied_table_is_stored_once(exported: Any) -> None:
    out = exported("tied-bf16", "executorch")
    row = weights(out, "model.embed_tokens.weight")[7].tobytes()
    assert program(out).read_bytes().count(row) == 1


def test_every_product_is_left_to_xnnpack_and_the_cache_is_written_in_place(exported: Any) -> None:
    for precision in ("fp32", "int4"):
        written = program(exported("wide-heads", "executorch"), precision).read_bytes()
        assert b"XnnpackBackend" in written
        assert b"aten::index_put_" in written
        for product in (b"aten::linear", b"aten::mm", b"aten::addmm", b"aten::bmm"):
            assert product not in written


def test_a_program_says_what_the_llm_runner_asks_it(exported: Any) -> None:
    file = program(exported("wide-heads", "executorch"))
    loaded = find_target("executorch").open(file.parent).programs[0]  # type: ignore[attr-defined]
    said = {n: loaded.load_method(n).execute([]) for n in loaded.method_names - {"forward"}}
    assert said["get_max_context_len"] == [512]
    assert said["get_max_seq_len"] == [128]
    assert said["get_vocab_size"] == [90]
    assert said["use_kv_cache"] == [True]
    assert said["get_bos_id"] == [1]
    assert said["get_eos_ids"] == [2]


def test_a_prompt_longer_than_a_call_is_read_in_parts(exported: Any, reference_of: Any) -> None:
    session = find_target("executorch").open(plain(exported), threads=1)
    tokens_BL = np.random.default_rng(0).integers(90, size=(1, 300))
    whole_BLV = session.start(tokens_BL)
    session.start(tokens_BL[:, :200])
    said_NV = np.concatenate([session.step(tokens_BL[:, at]) for at in range(200, 300)])
    # The same sums in another order.
    np.testing.assert_allclose(said_NV, whole_BLV[0, 200:], atol=1e-4)


def test_more_tokens_than_slots_are_refused(exported: Any) -> None:
    session = find_target("executorch").open(plain(exported), threads=1)
    with pytest.raises(UsageError, match=r"513 tokens.*512 slots"):
        session.start(np.zeros((1, 513), dtype=np.int64))
    session.start(np.zeros((1, 512), dtype=np.int64))
    with pytest.raises(UsageError, match=r"513 tokens.*512 slots"):
        session.step(np.zeros(1, dtype=np.int64))


def test_a_change_of_threads_ends_what_ran_on_the_old_pool(exported: Any) -> None:
    folder, target = plain(exported), find_target("executorch")
    prompt_BL = np.array([[3, 4, 5]])
    first = target.open(folder, threads=1)
    said_BLV = first.start(prompt_BL)
    target.open(folder, threads=2)
    assert portable_lib._threadpool_get_thread_count() == 2
    with pytest.raises(UsageError, match="start again"):
        first.step(np.array([6]))
    np.testing.assert_allclose(first.start(prompt_BL), said_BLV, atol=1e-5)


def test_what_cannot_be_loaded_is_named_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pte").write_bytes(b"no program" * 100)
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.pte.*export it again"):
        find_target("executorch").open(tmp_path, threads=1)
    assert capfd.readouterr() == ("", "")


def test_all_problems_are_listed_at_once(tiny_llama: Callable[[str], Path]) -> None:
    whole = Checkpoint.open(tiny_llama("wide-heads"))
    config = {
        **whole.config,
        "rope_parameters": {"rope_type": "dynamic"},
        "layer_types": ["full_attention", "linear_attention"],
        "quantization_config": {"quant_method": "gptq"},
        "is_encoder_decoder": True,
    }
    problems = find_target("executorch").problems(Checkpoint(whole.folder, config, {}), "fp32")
    wanted = ["dynamic", "linear_attention", "quantised", "encoder-decoder"]
    assert len(problems) == len(wanted)
    for word, problem in zip(wanted, problems, strict=True):
        assert word in problem


# --- planted faults, in the bytes of a program that was written

Written = Callable[[bytes, Path], bytes]


def replaced(written: bytes, old: bytes, new: bytes) -> bytes:
    assert old in written
    assert len(old) == len(new)
    return written.replace(old, new)


def changed(written: bytes, out: Path, name: str, change: Callable[[Any], Any]) -> bytes:
    before = weights(out, name)
    return replaced(written, before.tobytes(), change(before.copy()).tobytes())


def swapped(written: bytes, one: bytes, other: bytes) -> bytes:
    assert one in written
    assert other in written
    return other.join(part.replace(other, one) for part in written.split(one))


def mlp(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.{role}_proj.weight"


def nothing(written: bytes, out: Path) -> bytes:
    """The control: a copy must pass, or the faults prove nothing."""
    return written


def one_weight_changed(written: bytes, out: Path) -> bytes:
    def change(array: Any) -> Any:
        array[0, 0] += 10 * array.std()
        return array

    return changed(written, out, mlp(1, "down"), change)


def a_weight_that_is_no_number(written: bytes, out: Path) -> bytes:
    def change(array: Any) -> Any:
        array[0, 0] = np.nan
        return array

    return changed(written, out, mlp(1, "up"), change)


def table_rounded(written: bytes, out: Path) -> bytes:
    name = "model.embed_tokens.weight"
    return changed(written, out, name, lambda a: (np.trunc(a * 64) / 64).astype(np.float32))


def norm_without_its_scale(written: bytes, out: Path) -> bytes:
    return changed(written, out, "model.norm.weight", np.ones_like)


def layers_swapped(written: bytes, out: Path) -> bytes:
    one, other = (weights(out, mlp(layer, "down")).tobytes() for layer in (0, 1))
    return swapped(written, one, other)


def gate_and_up_swapped(written: bytes, out: Path) -> bytes:
    one, other = (weights(out, mlp(0, role)).tobytes() for role in ("gate", "up"))
    return swapped(written, one, other)


def mask_dropped(written: bytes, out: Path) -> bytes:
    return replaced(written, struct.pack("<d", -np.inf), struct.pack("<d", 0.0))


def mask_turned(written: bytes, out: Path) -> bytes:
    return replaced(written, b"aten::le\0", b"aten::ge\0")


def angles_turned(written: bytes, out: Path) -> bytes:
    return swapped(written, b"aten::cos\0", b"aten::sin\0")


def frequencies_changed(written: bytes, out: Path) -> bytes:
    """Those of heads of width 32 at a base of 10,000; the first two become 0."""
    turns = (1.0 / 10000 ** (np.arange(0, 32, 2, dtype=np.float32) / 32)).astype(np.float32)
    return replaced(written, turns[:1].tobytes() + turns[1:2].tobytes(), bytes(8))


FAULTS: list[Written] = [
    one_weight_changed,
    a_weight_that_is_no_number,
    table_rounded,
    norm_without_its_scale,
    layers_swapped,
    gate_and_up_swapped,
    mask_dropped,
    mask_turned,
    angles_turned,
    frequencies_changed,
]


@pytest.mark.parametrize("fault", [nothing, *FAULTS])
def test_each_of_ten_faults_in_a_written_program_is_found(
    fault: Written, exported: Any, reference_of: Any, tmp_path: Path
) -> None:
    out = exported("wide-heads", "executorch")
    folder = Path(shutil.copytree(program(out).parent, tmp_path / "copy"))
    file = folder / "model.pte"
    file.write_bytes(fault(file.read_bytes(), out))
    reference = reference_of("wide-heads")
    parity = check(find_target("executorch"), "fp32", folder, reference, artifact="under test")
    assert parity.passed == (fault is nothing), parity
    # Found by what it computes, not because it would not load.
    assert not any("cannot be run" in problem for problem in parity.problems)
