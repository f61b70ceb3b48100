"""The campaigns judge what they should: a sound case is clear, and a wrong one is seen."""

from __future__ import annotations

import random
import resource
import signal
import time
from pathlib import Path

import pytest

from dotexport.bench.tables import fault_plants, faults
from dotexport.bench.tables.damage import damaged
from dotexport.bench.tables.fault_inputs import small_model, subjects
from dotexport.bench.tables.forked import HUNG, KILLED, dotexport, forked


def test_a_fork_tells_how_it_ended() -> None:
    def fails() -> None:
        raise KeyError("x")

    assert forked(lambda: print("said")).said == "said\n"
    assert not forked(fails).clear
    assert forked(lambda: time.sleep(60), patience=0.1).code == HUNG
    assert forked(lambda: time.sleep(60), kill_after=0.1).code == KILLED == -signal.SIGKILL
    assert dotexport("plan", "no-such-folder").clear
    assert dotexport("plan", "no-such-folder").code == 1


def test_a_limit_holds_in_the_fork_alone(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "f"
    ending = forked(lambda: file.write_bytes(b"x" * 5000), {resource.RLIMIT_FSIZE: 1000})
    assert "OSError" in ending.said
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_the_same_seed_damages_alike() -> None:
    content = b'{"a": {"b": [1, 2]}, "c": "d"}'
    drawn = [
        [damaged(content, "json", random.Random(seed)) for seed in range(40)] for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert all(after != content for _, after in drawn[0] if after)


def test_an_exported_model_is_held_against_what_transformers_reads(tmp_path: Path) -> None:
    from dotexport.bench.tables.fault_inputs import as_transformers_reads

    model = small_model(tmp_path / "m")
    assert dotexport("export", model, "--target", "hf", "-o", tmp_path / "new").code == 0
    assert as_transformers_reads(tmp_path) == ""
    small_model(tmp_path / "m", seed=1)
    assert "logits differ" in as_transformers_reads(tmp_path)


def test_a_kill_that_leaves_half_an_output_is_seen(tmp_path: Path) -> None:
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "x").touch()
    assert "not that of a whole run" in faults._half(tmp_path / "out", {})
    assert faults._leftovers(tmp_path) == ""
    (tmp_path / ".out.lock").touch()
    assert faults._leftovers(tmp_path) == "left behind: .out.lock"


@pytest.mark.parametrize("name", ["model", "manifest, report", "gate", "recipe"])
def test_an_input_that_is_not_damaged_is_taken(tmp_path: Path, name: str) -> None:
    found = {subject.name: subject for subject in subjects(tmp_path)}[name]
    words = [str(word).replace("{}", str(found.folder)) for word in found.words]
    ending = dotexport(*words)
    assert ending.code == 0, ending.said
    assert found.right(found.folder) == ""


def test_nothing_but_kilobytes_of_rounded_weights_is_called_out_of_reach() -> None:
    def why(artifact: str, what: str) -> str:
        return fault_plants.Planted(artifact, what, True, "").why

    assert why("ort-cpu-int4", "model.onnx.data: 1 KB zeroed").startswith("out of reach")
    assert why("ort-cpu-fp32", "model.onnx.data: 1 KB zeroed") == "not seen"
    assert why("ort-cpu-int4", "model.onnx: ten times an epsilon") == "not seen"


def test_factors_of_one_product_do_not_change_places() -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    for seed in range(20):
        nodes = [
            make.make_node("Mul", inputs, [output])
            for inputs, output in ((["a", "b"], "ab"), (["ab", "c"], "abc"), (["d", "e"], "de"))
        ]
        model = make.make_model(make.make_graph(nodes, "g", [], []))
        fault_plants._node_skipped(model, random.Random(seed))
        left, of_it, apart = ([*node.input] for node in model.graph.node)
        assert apart != ["d", "e"]  # it is one of the two
        assert (left == ["a", "b"]) != (of_it == ["ab", "c"])
