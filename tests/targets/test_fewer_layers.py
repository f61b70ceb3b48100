"""A model that lost layers, and width that its own class cannot hold, in every target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dotexport import ShrinkOptions, SizeOptions, shrink
from dotexport.errors import RuntimeMissingError
from dotexport.exports.exporting import export
from dotexport.exports.target import find_target
from dotexport.models.checkpoint import read_config
from dotexport.models.text_options import TextOptions
from dotexport.narrowing.narrow_options import NarrowOptions


@pytest.fixture(scope="module")
def shallower(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shallower")
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{n * n % 87}" for n in range(4000)), encoding="utf-8")
    options = ShrinkOptions(
        sizes=SizeOptions(num_hidden_layers=2, hidden_size=64),
        text=TextOptions(source=str(text), samples=8, seqlen=32),
        narrow=NarrowOptions(local=None),
    )
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6}
    shrink(tiny_model(model_type="llama", **sizes), folder / "out", options)
    return folder / "out"


def test_it_is_carried_by_a_class_that_holds_it(shallower: Path) -> None:
    config = read_config(shallower / "hf")
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 64)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None


@pytest.mark.parametrize("name", ["ort-cpu", "onnx", "openvino", "gguf", "executorch", "mlx"])
def test_every_target_takes_it(name: str, shallower: Path) -> None:
    """Verified as it is written, in its own runtime."""
    try:
        target = find_target(name)
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    [artifact] = export(shallower, [f"{name}:{target.precisions[0]}"])
    assert artifact.parity is not None
    assert artifact.parity.problems == ()
