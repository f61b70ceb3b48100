"""What a token must read and compute, what the device can, and what follows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dotexport import embedded
from dotexport.bench import BenchResult, Workload
from dotexport.bench.counts import Cost, find_cost
from dotexport.bench.probe import bandwidth, last_level_cache, matrix_rate
from dotexport.bench.roofline import Gain, Limit, Rates
from dotexport.bench.table import verdicts
from dotexport.errors import RuntimeMissingError
from dotexport.exports.target import find_target, target_names
from dotexport.models.checkpoint import Checkpoint

Measured = tuple[BenchResult, dict[str, Any], list[tuple[str, int, int]]]

COST = Cost(
    weight_bytes=4_000_000,
    cache_bytes=1000,
    layer_parameters=900_000,
    head_parameters=100_000,
    attention_width=500,
    number="fp32",
)
RATES = Rates("cpu", {1_000_000: (8e9, 8e9), 100_000_000: (4e9, 4e9)}, {"fp32": (100e9, 100e9)})


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(Checkpoint.open(embedded.MODEL_DIR).config)


def test_bytes_of_a_step_are_those_of_the_weights_it_reads(config: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(embedded.MODEL_DIR)
    cost = find_cost(config, find_target("hf"), "as-stored", "fp32")
    assert cost is not None
    read = {
        name: math.prod(spec.shape)
        for name, spec in checkpoint.specs.items()
        if config["tie_word_embeddings"] or "embed_tokens" not in name
    }
    assert cost.weight_bytes == 4 * sum(read.values())


def test_operations_are_those_that_torch_counts(config: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    target = find_target("hf")
    session = target.open(embedded.MODEL_DIR, threads=1)
    cost = find_cost(config, target, "as-stored", "fp32")
    assert cost is not None
    asked = Workload(prompt_length=32, generation_length=2, batch_size=2)
    prompt_BL, _ = asked.tokens(100)
    with FlopCounterMode(display=False) as counter:
        session.start(prompt_BL)
    # torch counts attention whole where causality needs half of it, here a small part of all.
    assert cost.prefill(asked, 32).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_half_precision_halves_the_bytes_and_four_bits_leave_fewer(config: dict[str, Any]) -> None:
    hf, ort = find_target("hf"), find_target("ort-cpu")
    costs = [find_cost(config, hf, "as-stored", number) for number in ("fp32", "bf16")]
    full, half = (cost for cost in costs if cost is not None)
    assert full.weight_bytes == pytest.approx(2 * half.weight_bytes, rel=0.01)  # norms stay
    assert full.cache_bytes == 2 * half.cache_bytes
    four = find_cost(config, ort, "int4", None)
    assert four is not None
    assert four.weight_bytes < half.weight_bytes
    assert four.number == "int8"


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_a_cost_in_every_precision(name: str, config: dict[str, Any]) -> None:
    try:
        target = find_target(name)
    except RuntimeMissingError:
        pytest.skip(f"{name} is not installed")
    held_by_torch = {"hf", "gguf"}
    for precision in target.precisions:
        cost = find_cost(config, target, precision, "fp32" if name in held_by_torch else None)
        assert cost is not None
        assert min(cost.weight_bytes, cost.cache_bytes, cost.layer_parameters) > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_gguf_file_in_llama_cpp_reads_all_of_it_but_a_table_that_is_no_head(
    precision: str, tied: bool, config: dict[str, Any]
) -> None:
    from dotexport.models.families import find_family
    from dotexport.models.shapes import read_sizes

    target: Any = pytest.importorskip("dotexport.targets.ggml").Gguf()
    asked = config | {"tie_word_embeddings": tied}
    family = find_family(asked)
    sizes = read_sizes(family, asked)
    cost = find_cost(asked, target, precision, None)
    assert cost is not None
    weights = sizes.vocab_size * sizes.hidden_size
    # Bytes of 32 weights: halves; 8 bits and a half-precision scale, also of a table in Q4_0.
    table = weights // 32 * (64 if precision == "fp16" else 34)
    stored = target.stored_bytes(family, sizes, precision)
    assert cost.weight_bytes == stored - (0 if tied else table)


def test_a_model_of_an_unknown_family_has_no_cost(config: dict[str, Any]) -> None:
    unknown = config | {"architectures": ["Unheard"], "model_type": "unheard"}
    assert find_cost(unknown, find_target("hf"), "as-stored", "fp32") is None


def test_a_batch_reads_weights_once_and_computes_for_each() -> None:
    one, many = Workload(batch_size=1), Workload(batch_size=64)
    extra = 63 * COST.cache_bytes * (one.prompt_length + one.generation_length / 2)
    assert COST.decode(many).num_bytes - COST.decode(one).num_bytes == extra
    assert COST.decode(many).flops == 64 * COST.decode(one).flops


def test_what_binds_is_the_longer_of_the_two_or_neither() -> None:
    assert Limit(1, 1, bytes_ms=4, arithmetic_ms=1, measured_ms=5).binds == "bytes"
    assert Limit(1, 1, bytes_ms=1, arithmetic_ms=4, measured_ms=5).binds == "arithmetic"
    assert Limit(1, 1, bytes_ms=4, arithmetic_ms=1, measured_ms=50).binds == "overhead"


def test_overhead_that_stays_eats_the_gain() -> None:
    baseline = Limit(1, 1, bytes_ms=4, arithmetic_ms=0, measured_ms=8)
    candidate = Limit(1, 1, bytes_ms=2, arithmetic_ms=0, measured_ms=6.5)
    gain = Gain.of(candidate, baseline, 8 / 6.5)
    assert gain.at_the_limit == 2
    assert gain.beside_overhead == pytest.approx(8 / 6)
    unhindered = Gain.of(candidate, replace(baseline, measured_ms=4), 2.0)
    assert unhindered.beside_overhead == pytest.approx(2)


def test_bandwidth_is_that_of_an_array_of_the_same_size() -> None:
    assert RATES.bandwidth(1_000_000) == 8e9
    assert RATES.bandwidth(10_000_000) == pytest.approx(6e9)  # half way in powers of ten
    assert RATES.bandwidth(10**12) == 4e9


def test_rates_that_moved_are_told() -> None:
    moved = replace(RATES, arithmetic={"fp32": (100e9, 50e9)})
    assert RATES.drift == 0
    assert moved.drift == pytest.approx(1)
    assert Rates.from_dict(moved.as_dict()) == moved


def test_rates_are_measured_at_every_size_and_kind() -> None:
    moment = {"memory": [[10, 2.0], [20, 1.0]], "arithmetic": {"fp32": 5.0, "int8": None}}
    rates = Rates.of("cpu", [moment, moment])
    assert rates.memory == {10: (2.0, 2.0), 20: (1.0, 1.0)}
    assert rates.matrix_rate("int8") == rates.matrix_rate("fp32") == 5.0


def test_the_device_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dotexport.bench.probe.SECONDS", 0.0)
    # Any machine that runs torch reads more than 100 MB and multiplies more than 100 M a second.
    assert bandwidth(1 << 20) > 1e8
    assert (matrix_rate("fp32") or 0) > 1e8
    assert last_level_cache() >= 1 << 20


def test_what_the_device_cannot_multiply_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*matrices: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert matrix_rate("int8") is None


def test_a_result_says_what_binds_and_survives_json(measured: Measured) -> None:
    result = measured[0]
    assert result.roofline is None  # a planted model has no shapes
    models = (replace(model, cost=COST) for model in (result.candidate, result.baseline))
    candidate, baseline = models
    bound = replace(result, candidate=candidate, baseline=baseline, rates=RATES)
    assert bound.roofline is not None
    asked = result.workload
    found = bound.roofline.limits["candidate"]["decode"]
    assert found.bytes_ms == pytest.approx(
        COST.decode(asked).num_bytes / RATES.bandwidth(COST.decode(asked).num_bytes) * 1e3
    )
    assert BenchResult.from_dict(bound.as_dict()).as_dict() == bound.as_dict()
    assert "decode limit: candidate at" in "\n".join(verdicts(bound))
    assert "memory bandwidth" in bound.as_dict()["limit"]
    assert bound.as_dict()["roofline"]["gains"]["decode"]["at_the_limit"] == 1


def test_processes_at_once_share_the_device(measured: Measured) -> None:
    result = measured[0]
    models = [replace(model, cost=COST) for model in (result.candidate, result.baseline)]
    limits = []
    for number in (1, 2):
        asked = replace(result.workload, concurrency=number, threads=2)
        bound = replace(
            result, candidate=models[0], baseline=models[1], rates=RATES, workload=asked
        )
        limits.append(bound.roofline)
    assert limits[0] is not None
    assert limits[1] is not None
    one, two = (limit.limits["baseline"]["decode"] for limit in limits)
    assert two.flops == 2 * one.flops
