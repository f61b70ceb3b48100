"""Latency tables: never below the truth between sizes, a line in depth, only where they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dotexport.axes.plan import Plan, SizeOptions, read_model, resized
from dotexport.errors import UsageError
from dotexport.models.shapes import Sizes
from dotexport.sizes.budget import plan
from dotexport.sizes.deployment import Deployment
from dotexport.sizes.latency import Budget, find_table, parse_latency, promise
from dotexport.sizes.latency_table import (
    SCHEMA,
    LatencyTable,
    Times,
    cache_file,
    describe,
    device,
    runtime_versions,
)
from dotexport.sizes.planning import choose

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 90,
}
WHOLE = (256, 512, 4)
HIDDEN, MLP, HEADS = (128, 192, 256), (256, 384, 512), (2, 4)
Truth = Callable[[int, int, int], float]


def smooth(hidden: int, mlp: int, heads: int) -> float:
    return 1e4 + hidden * (3 * mlp + 128 * heads)


def stepped(hidden: int, mlp: int, heads: int) -> float:
    """A kernel with tiles of 100: most measured sizes lie just beyond an edge."""
    return 10 + math.ceil(hidden / 100) * (math.ceil(mlp / 100) + heads)


def keys() -> list[tuple[int, int, int]]:
    return [
        key for h in HIDDEN for key in (*((h, m, 4) for m in MLP), *((h, 512, g) for g in HEADS))
    ]


def times(truth: Truth, *, layers: int = 1) -> Times:
    whole = truth(*WHOLE)
    return Times(WHOLE, {k: truth(*k) / whole for k in keys()}, layers, layers, {})


@pytest.mark.parametrize("truth", [smooth, stepped])
def test_measured_sizes_are_read_as_measured(truth: Truth) -> None:
    for key in keys():
        assert times(truth).ratio(key) == pytest.approx(truth(*key) / truth(*WHOLE), rel=1e-12)


@pytest.mark.parametrize("truth", [smooth, stepped])
def test_between_measured_sizes_time_is_never_below_the_truth(truth: Truth) -> None:
    table = times(truth)
    for hidden in range(64, 257, 8):
        for mlp in range(128, 513, 8):
            for heads in (1, 2, 3, 4):
                true = truth(hidden, mlp, heads) / truth(*WHOLE)
                # The sum of MLP and heads is exact for both; 1e-12 is rounding.
                assert table.ratio((hidden, mlp, heads)) >= true * (1 - 1e-12)


@pytest.mark.parametrize("truth", [smooth, stepped])
def test_a_larger_size_never_costs_less_where_measurements_say_so(truth: Truth) -> None:
    table = times(truth)
    for row in (
        [(h, 400, 3) for h in range(64, 257, 8)],
        [(200, m, 3) for m in range(128, 513, 8)],
        [(200, 400, g) for g in (1, 2, 3, 4)],
    ):
        read = [table.ratio(key) for key in row]
        assert read == sorted(read)


def test_a_size_that_kernels_dislike_does_not_spoil_its_larger_neighbour() -> None:
    """384 slower than 512, as an unaligned width can be: 512 keeps its own time."""
    measured = {(256, 256, 4): 0.6, (256, 384, 4): 1.3, WHOLE: 1.0}
    table = Times(WHOLE, measured, 1, 1, {})
    assert table.ratio((256, 384, 4)) == 1.3
    assert table.ratio((256, 448, 4)) == 1.3
    assert table.ratio((256, 512, 4)) == 1.0


def test_depth_is_a_line() -> None:
    """Measured with 6 and 2 layers of 30: what comes once must not be counted thirty times."""

    def truth(key: tuple[int, int, int], layers: int) -> float:
        return 5 * key[0] + layers * smooth(*key) / 1e3

    anchor = truth(WHOLE, 6)
    measured = {key: truth(key, 6) / anchor for key in keys()}
    shallow = {h: truth((h, 512, 4), 2) / anchor for h in HIDDEN}
    table = Times(WHOLE, measured, 6, 30, shallow, 2)
    for key in keys():
        assert table.ratio(key) == pytest.approx(truth(key, 30) / truth(WHOLE, 30), rel=1e-9)
    assert table.deepened() == pytest.approx(truth(WHOLE, 30) / anchor, rel=1e-9)


# --- files


def content(truth: Truth = smooth, **changes: Any) -> dict[str, Any]:
    family, sizes = read_model(CONFIG)
    rows = [row(key, truth) for key in keys() if key != WHOLE]
    held = row((192, 448, 3), truth)
    held["decode"] |= {"predicted": 0.50, "measured": 0.55}
    held["prefill"] |= {"predicted": 0.50, "measured": 0.40}
    return {
        "schema": SCHEMA,
        "model": describe(family.architecture, sizes),
        "target": "ort-cpu",
        "precision": "fp32",
        "threads": 1,
        "device": device() | {"libraries": runtime_versions("ort-cpu")},
        "workload": {"prompt": 8, "generate": 4},
        "layers": {"model": 4, "measured": 4, "shallow": None},
        "original": {"1": {"decode_ms": 10.0, "prefill_ms": 40.0}},
        "rows": rows,
        "held_out": [held],
        **changes,
    }


def row(key: tuple[int, int, int], truth: Truth) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_key_value_heads")
    ratio = {"ratio": truth(*key) / truth(*WHOLE)}
    figures = {"decode": dict(ratio), "prefill": dict(ratio)}
    return dict(zip(names, key, strict=True)) | {"layers": 4, "batch": 1} | figures


def written(folder: Path, **changes: Any) -> str:
    file = folder / "table.json"
    file.write_text(json.dumps(content(**changes)), encoding="utf-8")
    return str(file)


def sizes_of(hidden: int, mlp: int, heads: int) -> Sizes:
    asked = {"hidden_size": hidden, "intermediate_size": mlp, "num_key_value_heads": heads}
    return resized(read_model(CONFIG)[1], asked)


def test_promises_are_raised_by_the_worst_held_out_size(tmp_path: Path) -> None:
    table = LatencyTable.load(Path(written(tmp_path)))
    cut = sizes_of(192, 512, 4)
    assert table.margin("decode", 1) == pytest.approx(0.1)
    assert table.margin("prefill", 1) == 0  # read too high: nothing to add, nothing to take off
    assert table.promised(cut, "decode", 1) == pytest.approx(
        1.1 * table.predicted(cut, "decode", 1)
    )
    assert table.promised(sizes_of(*WHOLE), "decode", 1) == 1


def test_a_budget_takes_sizes_that_the_table_promises(tmp_path: Path) -> None:
    file = written(tmp_path)
    for budget, limit in (("0.7x", 0.7), ("7ms", 0.7), ("prefill:28ms@1", 0.7), ("0.9x@1", 0.9)):
        asked = SizeOptions(latency=budget, latency_table=file)
        decided = plan(CONFIG, asked)
        promised = promise(decided, asked)
        assert promised is not None
        assert promised.limit == pytest.approx(limit)
        assert promised.predicted is not None
        assert 0.5 * limit < promised.predicted <= limit
        assert (promised.target, promised.precision, promised.threads) == ("ort-cpu", "fp32", 1)


def test_a_table_finds_a_cliff_that_a_count_of_parameters_does_not(tmp_path: Path) -> None:
    """Tiles of 384: MLPs of 392 to 504 take as long as 512, whatever their parameters."""

    def cliff(hidden: int, mlp: int, heads: int) -> float:
        return 1 + math.ceil(mlp / 384)

    explicit = {"hidden_size": 256, "num_key_value_heads": 4}
    asked = SizeOptions(
        latency="0.9x", latency_table=written(tmp_path, truth=cliff, held_out=[]), **explicit
    )
    by_time = plan(CONFIG, asked)
    by_count = plan(CONFIG, SizeOptions(params="0.9x", **explicit))
    assert 384 < by_count.after.intermediate_size < 512
    assert cliff(256, by_count.after.intermediate_size, 4) == cliff(*WHOLE)
    assert by_time.after.intermediate_size == 384


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": {"cpu": "another"}}, "cpu is .* here and 'another' in the table"),
        ({"threads": 4096}, "the table is of 4096 threads"),
        ({"device": device() | {"libraries": {"onnxruntime": "0.1"}}}, "libraries is"),
    ],
)
def test_a_table_of_elsewhere_is_refused_unless_forced(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = written(tmp_path, **changes)
    asked = SizeOptions(latency="0.7x", latency_table=file)
    with pytest.raises(UsageError, match=message) as refused:
        plan(CONFIG, asked)
    assert "--force-latency-table" in str(refused.value)
    forced = SizeOptions(latency="0.7x", latency_table=file, force_latency_table=True)
    assert plan(CONFIG, forced).ratio < 1


def test_a_table_of_another_model_is_refused_even_if_forced(tmp_path: Path) -> None:
    asked = SizeOptions(latency="0.7x", latency_table=written(tmp_path), force_latency_table=True)
    with pytest.raises(UsageError, match="of another model: it has num_layers 4 and not 5"):
        plan(CONFIG | {"num_hidden_layers": 5}, asked)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is no latency table; make one"), ("{}", "schema is None"), ("{", "again")],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "table.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(Exception, match=message) as refused:
        plan(CONFIG, SizeOptions(latency="0.7x", latency_table=str(file)))
    assert getattr(refused.value, "exit_code", None) in (1, 2)


def test_files_that_earlier_releases_measured_are_still_read() -> None:
    """The name stands in caches of users: modules may move, it may not."""
    assert SCHEMA == "dotexport.latency/1"


def test_a_table_in_the_cache_is_found_by_itself_and_by_its_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    family, sizes = read_model(CONFIG)
    whole = Plan(family, sizes, sizes)
    assert find_table(whole, SizeOptions(latency="0.7x")) is None
    for precision in ("fp32", "int4"):
        table = content(precision=precision)
        cache_file(table).parent.mkdir(parents=True, exist_ok=True)
        cache_file(table).write_text(json.dumps(table), encoding="utf-8")
        if precision == "fp32":
            found = find_table(whole, SizeOptions(latency="0.7x"))
            assert found is not None
            assert found.runtime == "ort-cpu:fp32"
    with pytest.raises(UsageError, match=r"several .*ort-cpu:fp32 .*ort-cpu:int4"):
        find_table(whole, SizeOptions(latency="0.7x"))
    named = find_table(whole, SizeOptions(latency="0.7x", latency_table="ort-cpu:int4"))
    assert named is not None
    assert named.content["precision"] == "int4"
    with pytest.raises(UsageError, match="measure one: `dotexport latency MODEL --target hf`"):
        find_table(whole, SizeOptions(latency="0.7x", latency_table="hf"))


def test_a_plan_for_other_runtimes_refuses_the_table(tmp_path: Path) -> None:
    from dotexport.sizes.latency import check_runtime

    asked = SizeOptions(latency="0.7x", latency_table=written(tmp_path))
    where = Deployment(targets=("ort-cpu:fp32",))
    chosen = choose(CONFIG, asked, where)
    check_runtime(chosen.plan, asked, where.targets)
    with pytest.raises(UsageError, match="ort-cpu:fp32, which is none of the targets ort-cpu:int4"):
        check_runtime(chosen.plan, asked, ("ort-cpu:int4",))


# --- budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.8x", Budget("decode", 0.8, True, None)),
        ("12ms", Budget("decode", 12, False, None)),
        (" prefill:.5x@4 ", Budget("prefill", 0.5, True, 4)),
    ],
)
def test_budgets_of_time_are_read_as_written(text: str, budget: Budget) -> None:
    assert parse_latency(text) == budget


@pytest.mark.parametrize("text", ["", "0.8", "1.2x", "0ms", "0x", "-1ms", "0.8x@0", "load:0.8x"])
def test_what_is_no_budget_of_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 0\.8x"):
        parse_latency(text)


def test_budgets_that_a_table_cannot_answer_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path)
    with pytest.raises(UsageError, match="holds batch 1 and no 4"):
        plan(CONFIG, SizeOptions(latency="0.8x@4", latency_table=file))
    with pytest.raises(UsageError, match="more than the 10 ms that the original takes"):
        plan(CONFIG, SizeOptions(latency="11ms", latency_table=file))
    with pytest.raises(UsageError, match="give --latency"):
        SizeOptions(params="0.7x", latency_table=file)
