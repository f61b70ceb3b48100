"""`--device` means what it says in every verb that takes it: all that is computed there lies there,
little is sent there, and no loop over the text makes the host wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dotexport.errors import RuntimeMissingError, UsageError
from dotexport.narrowing import streams
from dotexport.narrowing.prepare import pick_device
from dotexport.narrowing.streams import Streams

from ..pretended import Gpu, pretended
from .conftest import Command

SHAPES = ("--samples", 4, "--seqlen", 32, *(ALONE := ("--other", "none")))


def test_a_device_has_a_number_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RuntimeMissingError, match="--device cuda:2: torch sees 2 CUDA devices"):
        pick_device("cuda:2")
    with pytest.raises(UsageError, match="--device mps has no float64"):
        pick_device("mps")
    with pytest.raises(UsageError, match="--device tpu is not known; expected auto, cpu, cuda"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


TOKENS = 8 * 4 * 32  # bytes of the calibration text
DRAWN = 8 * 64 * 2048  # of the places that local healing reads: sent once, not for every layer


def model_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def on_a_gpu(dotexport: Command, *arguments: object) -> Gpu:
    """What a command that ends well does there."""
    with pytest.MonkeyPatch.context() as patch, pretended(patch) as gpu:
        ended = dotexport(*arguments)
    assert ended.code == 0, ended.err
    return gpu


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "auto"])
def test_shrink_computes_where_it_is_told_to(
    name: str, dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    asked = ("shrink", model, "-o", tmp_path / "out", "--calib", text, *SHAPES)
    gpu = on_a_gpu(dotexport, *asked, "--hidden", 32, "--intermediate", 64, "--device", name)
    assert gpu.places == {"cuda:1" if name == "cuda:1" else "cuda:0"}
    assert model_bytes(model) < gpu.sent <= 3 * (model_bytes(model) + TOKENS) + DRAWN


def test_every_way_to_shrink_computes_there(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    """Layers and sizes that are measured, all bases, merges, fewer heads, distillation."""
    asked = ("shrink", model, "-o", tmp_path / "out", "--calib", text, *SHAPES, "--device", "cuda")
    more = ("--mlp", "dot", "--heads", "dot", "--basis", "auto", "--heal", "local+2")
    cut = ("--hidden", 32, "--intermediate", 64, "--kv-heads", 1, "--layers", 2)
    gpu = on_a_gpu(dotexport, *asked, *more, *cut, "--heal-precision", "fp32")
    assert gpu.places == {"cuda:0"}
    budget = ("--params", "0.7x", "--allocate", "measured", "--heal", "none", "--overwrite")
    assert on_a_gpu(dotexport, *asked, *budget).places == {"cuda:0"}


def test_eval_and_run_compute_there(
    dotexport: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    """All but continuations and sampled text, whose caches nothing can pretend."""
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    asked = ("shrink", model, "-o", out, "--calib", text, *SHAPES, "--intermediate", 64)
    printed = dotexport(*asked, "--heal", "none", "--print-recipe").out
    recipe.write_text(
        printed.replace(
            "eval: null", f"eval: {{text: {text}, seqlen: 32, other: none, prompts: 0}}"
        )
    )
    ran = on_a_gpu(dotexport, "run", recipe, "-o", out, "--device", "cuda:1")
    assert "cuda:1" in ran.places
    assert ran.places <= {"cuda:1"}
    judge = ("eval", out, "--baseline", model, "--text", text, "--seqlen", 32, "--prompts", 0)
    judge += ("--other", "none")
    gpu = on_a_gpu(dotexport, *judge, "--device", "cuda")
    assert gpu.places == {"cuda:0"}
    tokens = 8 * 500
    assert gpu.sent <= 3 * (model_bytes(model) + tokens)


def test_more_text_makes_the_host_wait_no_more_often(
    dotexport: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While layers are narrowed: with four times the batches, and more units that leave."""
    monkeypatch.setattr(streams, "TOKENS_PER_BATCH", 32)
    waits = []
    for samples, inside in ((3, 64), (12, 40)):
        asked = (
            "shrink",
            model,
            "-o",
            tmp_path / str(samples),
            "--calib",
            text,
            "--seqlen",
            32,
            *ALONE,
        )
        cut = ("--samples", samples, "--intermediate", inside, "--ridge", 1e-3, "--device", "cuda")
        gpu = on_a_gpu(dotexport, *asked, *cut)
        waits.append(+gpu.waits)
    assert set(waits[0]) == set(waits[1])
    more = {line: (n, waits[1][line]) for line, n in waits[0].items() if waits[1][line] > n}
    assert more == {}
    assert sum(waits[0].values()) > 0


def test_streams_lie_on_the_device_while_they_fit_and_pinned_beside_it_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows_NL, seen = torch.zeros(4, 8, dtype=torch.long), []
    empty = torch.empty

    def noted(*shape: Any, pin_memory: bool = False, **asked: Any) -> torch.Tensor:
        seen.append((str(asked.get("device", "host")), pin_memory))
        return empty(*shape, dtype=torch.float32)

    monkeypatch.setattr(torch, "empty", noted)
    for name, free in (("cuda:1", 1 << 20), ("cuda:1", 1 << 10), ("cpu", 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 30))
        Streams.allocate(windows_NL, 6, 5, device=torch.device(name))
    assert seen == [("cuda:1", False)] * 2 + [("host", True)] * 2 + [("host", False)] * 2
