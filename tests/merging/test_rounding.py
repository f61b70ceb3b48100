"""Rounding for what goes in, against slower ways to the same, and never worse than to nearest."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from dotexport.exports.reference import rounded_to_4_bits
from dotexport.merging import rounding
from dotexport.merging.rounding import (
    FOUR_BITS,
    MOST_ERROR,
    Blocks,
    Grid,
    inverse_factor,
    moved,
    nearest,
    output_error,
    solve,
)

torch.manual_seed(0)
INPUTS_TI = torch.randn(300, 80, dtype=torch.float64) @ torch.randn(80, 80, dtype=torch.float64)
GRAM_II = INPUTS_TI.T @ INPUTS_TI
WEIGHTS_OI = torch.randn(24, 80) * 0.05
FOUR, EIGHT = Blocks(32, (-8, 7), shares=FOUR_BITS), Blocks(32, (-127, 127), torch.float16)


def k_quants() -> list[Any]:
    gguf = pytest.importorskip("gguf")
    from dotexport.targets.kquants import Superblocks

    kinds = gguf.GGMLQuantizationType
    return [Superblocks(kinds.Q4_K), Superblocks(kinds.Q6_K)]


@pytest.mark.parametrize("grid", [FOUR, EIGHT])
def test_no_row_is_worse_than_rounded_to_nearest(grid: Grid) -> None:
    found = solve(WEIGHTS_OI, GRAM_II, grid)
    plain_OI = nearest(WEIGHTS_OI, grid)[1]
    ours_O, theirs_O = (output_error(v - WEIGHTS_OI, GRAM_II) for v in (found.values_OI, plain_OI))
    assert (ours_O <= theirs_O).all()
    assert found.loss < 0.6 * found.nearest  # correlated inputs leave much to gain
    assert found.loss == pytest.approx(
        float(ours_O.sum() / output_error(WEIGHTS_OI, GRAM_II).sum()), rel=1e-6
    )
    # A row stays within reach of what it was, or is as rounding to nearest leaves it.
    far_O = moved(found.values_OI, WEIGHTS_OI) / moved(plain_OI, WEIGHTS_OI)
    assert far_O.max() <= MOST_ERROR


@pytest.mark.parametrize("number", [0, 1])
def test_superblocks_gain_as_blocks_do(number: int) -> None:
    grid = k_quants()[number]
    inputs_TI = torch.randn(400, 512, dtype=torch.float64) * torch.rand(512).double()
    inputs_TI += inputs_TI[:, torch.randperm(512)]
    found = solve(torch.randn(8, 512) * 0.05, inputs_TI.T @ inputs_TI, grid)
    assert found.loss < 0.8 * found.nearest


def test_to_nearest_is_what_every_verification_rounds_to() -> None:
    assert torch.equal(nearest(WEIGHTS_OI, FOUR)[1], rounded_to_4_bits(WEIGHTS_OI))


def test_what_a_column_leaves_is_taken_over_as_least_squares_would() -> None:
    """Column by column in float64: those behind it minimise the whole error, given those in front;
    no factor of an inverse is involved."""
    grid = Blocks(80, (-8, 7))
    damped_II = GRAM_II + torch.eye(80) * rounding.DAMPING * GRAM_II.diagonal().mean()
    weights_OI = WEIGHTS_OI.double()
    scale_O1 = next(grid.lattices(WEIGHTS_OI, torch.ones(80))).step_OW.double()
    target_OI, error_OI, levels = weights_OI.clone(), torch.zeros_like(weights_OI), []
    for i in range(80):
        levels.append((target_OI[:, i] / scale_O1[:, 0]).round().clamp(-8, 7))
        error_OI[:, i] = weights_OI[:, i] - scale_O1[:, 0] * levels[-1]
        done, rest = slice(0, i + 1), slice(i + 1, 80)
        moved_RO = torch.linalg.solve(
            damped_II[rest, rest], damped_II[rest, done] @ error_OI[:, done].T
        )
        target_OI[:, rest] = weights_OI[:, rest] + moved_RO.T
    found = rounding._walked(WEIGHTS_OI, inverse_factor(GRAM_II), grid)[0]
    same = (found.levels_OI == torch.stack(levels, 1)).double().mean()
    assert same > 0.99  # a tie may fall either way in float32, and moves what comes behind


def test_it_comes_near_the_best_of_all_roundings() -> None:
    grid = Blocks(4, (-2, 1))
    ratios = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        weights_1I = torch.randn(1, 4, generator=random)
        inputs_TI = torch.randn(50, 4, generator=random) @ torch.randn(4, 4, generator=random)
        gram_II = (inputs_TI.T @ inputs_TI).double()
        step = next(grid.lattices(weights_1I, None)).step_OW
        every_NI = torch.tensor(list(product(range(-2, 2), repeat=4))) * step
        best = output_error(every_NI - weights_1I, gram_II).min()
        ours = output_error(solve(weights_1I, gram_II, grid).values_OI - weights_1I, gram_II)
        assert ours >= best * (1 - 1e-6)
        ratios.append(float(ours / best))
    assert sorted(ratios)[len(ratios) // 2] < 1.3


def test_inputs_that_never_come_leave_weights_near_what_they_were() -> None:
    dead_II = GRAM_II.clone()
    dead_II[40:], dead_II[:, 40:] = 0, 0
    found = solve(WEIGHTS_OI, dead_II, FOUR)
    plain_OI = nearest(WEIGHTS_OI, FOUR)[1]
    assert torch.isfinite(found.values_OI).all()
    assert (moved(found.values_OI, WEIGHTS_OI) <= MOST_ERROR * moved(plain_OI, WEIGHTS_OI)).all()
    silent = solve(WEIGHTS_OI, torch.zeros_like(GRAM_II), FOUR)
    assert torch.isfinite(silent.values_OI).all()


def test_rows_are_rounded_alike_however_many_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve(WEIGHTS_OI, GRAM_II, FOUR)
    monkeypatch.setattr(rounding, "ROWS", 7)
    parts = solve(WEIGHTS_OI, GRAM_II, FOUR)
    assert (whole.rounded.levels_OI == parts.rounded.levels_OI).double().mean() > 0.99
    assert parts.loss == pytest.approx(whole.loss, rel=0.02)
