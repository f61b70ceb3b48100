"""Products of passes in bfloat16: taken where they cost nothing, and close to those in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dotexport.app.opening import open_source
from dotexport.app.shrink_options import ShrinkOptions
from dotexport.app.shrinking import shrink
from dotexport.axes.plan import SizeOptions, read_model
from dotexport.embedded import MODEL_DIR
from dotexport.errors import UsageError
from dotexport.models.layers import Layer, Stock, layer_tensors
from dotexport.models.shapes import shapes
from dotexport.models.text_options import TextOptions
from dotexport.narrowing import prepare
from dotexport.narrowing.narrow_options import LocalOptions, NarrowOptions
from dotexport.narrowing.prepare import dtype_of_passes

CPU = torch.device("cpu")


def layer(model: Path, passes: torch.dtype) -> Layer:
    source = open_source(model)
    family, sizes = read_model(source.config)
    names = dict(shapes(family, sizes))
    tensors = layer_tensors(family, 0, lambda name: source.tensor(name).float(), names)
    return Layer(Stock.of(source.config, CPU, passes), family, 0, tensors)


def test_a_pass_in_bfloat16_is_the_pass_in_float32_but_for_its_rounding() -> None:
    exact, rounded = (layer(MODEL_DIR, dtype) for dtype in (torch.float32, torch.bfloat16))
    x_BLD = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(0))
    for sublayer in exact.family.sublayers:
        expected, found = exact.after(sublayer, x_BLD), rounded.after(sublayer, x_BLD)
        assert found.dtype == torch.float32
        written = expected - x_BLD
        off = float((found - expected).norm() / written.norm())
        # bfloat16 keeps 8 bits: 2^-9 at each of a handful of roundings, most of which cancel.
        assert 0 < off < 0.02


@pytest.mark.parametrize(
    ("model", "native", "expected"),
    [
        ("tied-bf16", True, torch.bfloat16),
        ("tied-bf16", False, torch.float32),
        ("biased", True, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_weights_are_stored_so_and_the_device_has_it(
    model: str,
    native: bool,
    expected: torch.dtype,
    tiny_llama: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "multiplies_bfloat16", lambda device: native)
    monkeypatch.setattr(prepare, "WIDE", 16)
    source = open_source(tiny_llama(model))
    assert dtype_of_passes(source, NarrowOptions(), CPU) == expected
    monkeypatch.setattr(prepare, "WIDE", 1024)
    assert dtype_of_passes(source, NarrowOptions(), CPU) == torch.float32
    assert dtype_of_passes(source, NarrowOptions(passes="float32"), CPU) == torch.float32
    assert dtype_of_passes(source, NarrowOptions(passes="bfloat16"), CPU) == torch.bfloat16


def test_a_model_narrowed_with_passes_in_bfloat16_is_about_as_good(tmp_path: Path) -> None:
    found = {}
    for passes in ("float32", "bfloat16"):
        out = tmp_path / passes
        asked = ShrinkOptions(
            sizes=SizeOptions(intermediate_size=384),
            text=TextOptions(source="embedded:calibration", samples=16, seqlen=128),
            # Few steps: a CPU without such products takes them apart.
            narrow=NarrowOptions(passes=passes, local=LocalOptions(least_steps=8)),
        )
        found[passes] = shrink(MODEL_DIR, out, asked, device="cpu").divergence
        manifest = json.loads((out / "dotexport.json").read_text())
        assert manifest["environment"]["passes"] == passes
    # The two streams that are compared are rounded apart, which a small divergence shows first.
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


def test_other_passes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"auto, bfloat16, float32.*float16"):
        NarrowOptions(passes="float16")
