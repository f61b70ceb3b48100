"""What tokens count for by context: against transformers, position by position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from dotexport.axes.plan import Plan, SizeOptions
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.layers import Stock
from dotexport.models.loading import load_float32
from dotexport.narrowing.calibration_text import CalibrationText
from dotexport.narrowing.context import BLOCK, context_weights
from dotexport.narrowing.judging import Head, compared, divergences
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.original import Original
from dotexport.narrowing.prepare import rehearsals
from dotexport.sizes.budget import plan

CPU = torch.device("cpu")
TinyLlama = Callable[[str], Path]


def opened(folder: Path) -> tuple[Checkpoint, Original]:
    source = Checkpoint.open(folder)
    decided: Plan = plan(source.config, SizeOptions(intermediate_size=80))
    stock = Stock.of(source.config, CPU)
    return source, Original(source, decided.family, decided.before, stock, CPU)


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def test_a_token_counts_by_what_its_prediction_owes_to_text_further_back(
    tiny_llama: TinyLlama,
) -> None:
    """Of every position transformers is asked with all of the window, and with the block that it is
    in the second half of; the tail that fills no block counts by one."""
    source, original = opened(tiny_llama("wide-heads"))
    windows_NL, half = windows(2, 2 * BLOCK + 23), BLOCK // 2
    found_NL = context_weights(original, windows_NL)
    model = load_float32(source)
    with torch.inference_mode():
        whole_NLV = log_softmax(model(windows_NL).logits, -1)
        owed: dict[tuple[int, int], float] = {}
        for window in range(2):
            for place in range(half, 5 * half):
                start = (place // half - 1) * half
                said_SV = model(windows_NL[window : window + 1, start : place + 1]).logits[0]
                p_V, q_V = whole_NLV[window, place], log_softmax(said_SV[-1], -1)
                owed[window, place] = float((p_V.exp() * (p_V - q_V)).sum())
    mean = sum(owed.values()) / len(owed)
    assert mean > 0.01  # there is something to find
    for (window, place), nats in owed.items():
        assert float(found_NL[window, place]) == pytest.approx(0.5 + 0.5 * nats / mean, abs=1e-3)
    assert (found_NL[:, :half] == 1).all()
    assert (found_NL[:, 5 * half :] == 1).all()
    assert float(found_NL.mean()) == pytest.approx(1.0, abs=1e-5)


def test_all_count_alike_where_nothing_is_owed(
    tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows without anything further back, and a model whose attention adds nothing."""
    _, original = opened(tiny_llama("wide-heads"))
    assert (context_weights(original, windows(2, BLOCK)) == 1).all()
    layer = Original.layer

    def deaf(self: Original, number: int) -> object:
        made = layer(self, number)
        made.assign("self_attn.o_proj.weight", torch.zeros(48, 128))
        return made

    monkeypatch.setattr(Original, "layer", deaf)
    assert (context_weights(original, windows(2, 4 * BLOCK)) == 1).all()


@torch.no_grad()
def test_a_divergence_is_the_sum_of_its_tokens_by_weight(tiny_llama: TinyLlama) -> None:
    _, original = opened(tiny_llama("wide-heads"))
    head = Head(original.stock, original.folded_head())
    theirs_TD, ours_TD = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    each = [
        divergences((head, x[None]), [(head, y[None])])[0]
        for x, y in zip(theirs_TD, ours_TD, strict=True)
    ]
    weights_T = torch.arange(7.0)
    found = divergences((head, theirs_TD), [(head, ours_TD)], weights_T)
    assert found == pytest.approx([sum(n * kl for n, kl in enumerate(each))], rel=1e-5)
    assert compared((head, theirs_TD), [(head, ours_TD)])[0][0] == pytest.approx(
        sum(each), rel=1e-5
    )


def test_sizes_are_rehearsed_by_context(
    tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all plans: weights of ones give another figure, and twos the double of that."""
    source, _ = opened(tiny_llama("wide-heads"))
    planned = plan(source.config, SizeOptions(intermediate_size=40))
    calls = []

    def figure(value: float | None) -> float:
        def weights(original: Original, windows_NL: torch.Tensor) -> torch.Tensor:
            calls.append(len(windows_NL))
            found = context_weights(original, windows_NL)
            return found if value is None else torch.full_like(found, value)

        monkeypatch.setattr("dotexport.narrowing.prepare.context_weights", weights)
        measure = rehearsals(source, CalibrationText(windows(16, 4 * BLOCK)), NarrowOptions(), CPU)
        first = measure(planned)
        assert measure(planned) == first
        return first

    by_context, alike, twice = figure(None), figure(1.0), figure(2.0)
    assert calls == [16, 16, 16]
    assert twice == pytest.approx(2 * alike, rel=1e-6)
    assert abs(by_context / alike - 1) > 1e-3
