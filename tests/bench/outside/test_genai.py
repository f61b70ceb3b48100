"""The outside judge: onnxruntime-genai's own generator, in turns with the bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dotexport.bench import Workload
from dotexport.bench.outside.genai import METRICS, disagreement
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import Checkpoint


def test_both_time_the_same_folder_in_fresh_processes(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    target = find_target("ort-cpu")
    if target.missing():
        pytest.skip("ort-cpu is not installed")
    target.write(Checkpoint.open(tiny_llama("wide-heads")), tmp_path, "fp32")
    asked = Workload(
        prompt_length=4, generation_length=4, threads=1, rounds=2, min_iterations=8, min_warmups=1
    )
    found = disagreement(tmp_path, asked)
    assert set(found) == set(METRICS)
    for ours, theirs, over in found.values():
        # Milliseconds of a model of two layers on either side, not seconds and not nanoseconds.
        assert 0.01 < ours < 1000
        assert 0.01 < theirs < 1000
        assert over.low <= over.ratio <= over.high
        assert over.groups == asked.rounds
