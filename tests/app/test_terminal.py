"""What people see of an allocation."""

from __future__ import annotations

import pytest

from dotexport.app.terminal import show_allocation
from dotexport.axes.plan import SizeOptions
from dotexport.sizes.allocation import allocate


def test_an_allocation_is_shown_as_curves_and_candidates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    }
    found = allocate(config, SizeOptions(params="0.7x"), lambda plan: 1 - plan.ratio)
    show_allocation(found)
    shown = capsys.readouterr().err
    for curve in found.curves:
        assert f"{curve.sizes[0]:,}" in shown
    assert "█" * 12 in shown  # the dearest cut fills the bar
    assert f"{found.plan.parameters_after:,}" in shown
