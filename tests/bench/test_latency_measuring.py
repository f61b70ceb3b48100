"""The latency verb on planted models: a table of waits that are known, cliff and depth included."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dotexport.app.cli import main
from dotexport.axes.plan import Plan, SizeOptions, read_model
from dotexport.bench.latency_measuring import measure_table
from dotexport.bench.latency_sizes import depth_of, shallow_config
from dotexport.bench.promise import verdict
from dotexport.bench.statistics import Comparison
from dotexport.errors import SizeError, UnsupportedModelError, UsageError
from dotexport.sizes.budget import plan
from dotexport.sizes.latency_options import LatencyOptions
from dotexport.sizes.latency_table import times_of

PLANTED = Path(__file__).parent / "planted"
TILE = 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "planted": {"tile": TILE},
}
OPTIONS = LatencyOptions(
    target="planted",
    precision="slow",
    prompt=4,
    generate=3,
    threads=1,
    points=2,
    layers=3,
    rounds=2,
    held_out=1,
)


def wait(hidden: int, mlp: int, heads: int) -> float:
    """Milliseconds of a step of the planted target: its tiled()."""
    layer_ms = 1.5 * math.ceil(mlp / TILE) + 0.5 * heads
    return float(1 + hidden / 16 + layer_ms * CONFIG["num_hidden_layers"])


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A table of the planted model, as JSON gives it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLANTED))
        model = write(tmp_path_factory.mktemp("tiled"))
        table: dict[str, Any] = json.loads(json.dumps(measure_table(model, OPTIONS)))
        return table


def test_a_table_says_what_was_planted_with_half_of_the_layers(measured: dict[str, Any]) -> None:
    assert measured["layers"] == {"model": 6, "measured": 3, "shallow": 1}
    table = times_of(measured, "decode", 1)
    for key in table.measured:
        # A wait of 10 ms ends late by less than 1, and the line in depth doubles that.
        assert table.ratio(key) == pytest.approx(wait(*key) / wait(64, 160, 2), rel=0.15)
    assert measured["original"]["1"]["decode_ms"] == pytest.approx(wait(64, 160, 2), rel=0.15)


def test_raw_samples_and_conditions_are_kept(measured: dict[str, Any]) -> None:
    row = measured["rows"][0]["decode"]
    assert len(row["samples_ms"]) == len(row["original_samples_ms"]) == OPTIONS.rounds
    assert row["low"] <= row["ratio"] <= row["high"]
    assert measured["device"].keys() >= {"cpu", "usable_cores", "libraries"}
    assert (measured["target"], measured["precision"], measured["threads"]) == (
        "planted",
        "slow",
        1,
    )


def test_held_out_sizes_are_measured_whole_beside_what_the_table_says(
    measured: dict[str, Any],
) -> None:
    [row] = measured["held_out"]
    assert row["layers"] == 6
    assert {"predicted", "measured"} <= row["decode"].keys()
    key = (row["hidden_size"], row["intermediate_size"], row["num_key_value_heads"])
    assert key not in times_of(measured, "decode", 1).measured
    # Between measured sizes the table is never below the truth; noise may be, a little.
    assert row["decode"]["predicted"] >= 0.9 * wait(*key) / wait(64, 160, 2)


def test_a_measured_cliff_decides_where_a_count_of_parameters_would_not(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLPs of 136 to 160 take three tiles: only two make a token faster."""
    monkeypatch.syspath_prepend(str(PLANTED))
    file = tmp_path / "table.json"
    file.write_text(json.dumps(measured), encoding="utf-8")
    uncut = {"hidden_size": 64, "num_key_value_heads": 2}
    by_time = plan(CONFIG, SizeOptions(latency="0.9x", latency_table=str(file), **uncut))
    by_count = plan(CONFIG, SizeOptions(params="0.9x", **uncut))
    assert math.ceil(by_count.after.intermediate_size / TILE) == 3
    assert math.ceil(by_time.after.intermediate_size / TILE) <= 2


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dotexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_plan_reads_a_table_on_the_command_line(
    measured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, file = write(tmp_path / "model"), tmp_path / "table.json"
    file.write_text(json.dumps(measured), encoding="utf-8")
    flags = ("--latency", "0.8x", "--latency-table", file)
    assert call(monkeypatch, "plan", model, *flags, "--json") == 0
    said = json.loads(capsys.readouterr().out)["latency"]
    assert 0 < said["predicted"] <= said["limit"] == 0.8
    assert call(monkeypatch, "plan", model, *flags, "--target", "planted:quick") == 2
    assert "none of the targets" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--batch", "1,x"), 2, "numbers such as 1 or 1,4"),
        (("--batch", "2,2"), 2, "different numbers"),
        (("--points", "1"), 2, "points is 1"),
        (("--least", "1"), 2, "least is 1"),
        (("--prompt", "62"), 2, "the model's context is 64"),
        (("--target", "planted:slow", "--precision", "quick"), 2, "contradict"),
        (("--target", "nothing"), 2, "no target is called"),
        (("--layers", "1"), 2, "give 2"),
    ],
)
def test_a_wrong_request_is_one_message_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    model = write(tmp_path / "model")
    short = ("--target", "planted", "--prompt", "4", "--generate", "3")
    assert call(monkeypatch, "latency", model, *short, *flags) == code
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_what_a_target_cannot_hold_is_refused_before_measuring(tmp_path: Path) -> None:
    model = write(tmp_path / "model", problems=["too wide", "too long"])
    with pytest.raises(UnsupportedModelError, match="too wide; too long"):
        measure_table(model, OPTIONS)


def test_a_model_without_smaller_sizes_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", hidden_size=8, intermediate_size=8, num_key_value_heads=1)
    with pytest.raises(SizeError, match="no legal size"):
        measure_table(model, OPTIONS)


def test_deep_models_are_measured_in_part_and_small_ones_whole() -> None:
    family, sizes = read_model(CONFIG)
    whole = Plan(family, sizes, sizes)
    assert depth_of(whole, LatencyOptions()).shallow is None
    deep = depth_of(whole, LatencyOptions(budget=4 * whole.parameters_before // 2 + 1000))
    assert 2 <= deep.measured < 6
    assert deep.shallow is not None
    assert 1 <= deep.shallow < deep.measured
    with pytest.raises(UsageError, match="layers is 0"):
        LatencyOptions(layers=0)


def test_a_shallow_config_names_the_kinds_of_its_layers_alone() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "full"]}
    assert shallow_config(config, 2) == {
        "num_hidden_layers": 2,
        "layer_types": ["full", "sliding"],
    }


@pytest.mark.parametrize(
    ("low", "ratio", "high", "word"),
    [
        (0.70, 0.75, 0.79, "kept"),
        (0.75, 0.79, 0.83, "kept within noise"),
        (0.78, 0.82, 0.86, "missed within noise"),
        (0.82, 0.84, 0.86, "missed"),
    ],
)
def test_a_promise_is_judged_by_the_interval(
    low: float, ratio: float, high: float, word: str
) -> None:
    assert verdict(Comparison(ratio, low, high, groups=8), 0.8) == word
