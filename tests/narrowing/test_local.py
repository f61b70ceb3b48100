"""Local healing of one sublayer."""

from __future__ import annotations

import pytest
import torch

from dotexport.errors import UsageError
from dotexport.narrowing.local import Healed, heal
from dotexport.narrowing.narrow_options import LocalOptions
from dotexport.narrowing.streams import Streams, onto

WIDTH = 6


def streams(windows: int = 16) -> Streams:
    """A stream of random tokens, and what a gated layer of four neurons makes of it."""
    random = torch.Generator().manual_seed(0)
    made = Streams.allocate(
        torch.zeros(windows, 8, dtype=torch.long), WIDTH, WIDTH, device=torch.device("cpu")
    )
    made.narrowed_NLK[:] = torch.randn(windows, 8, WIDTH, generator=random)
    gate, up, down = (torch.randn(4, WIDTH, generator=random) for _ in range(3))
    made.original_NLD[:] = layer(made.narrowed_NLK, gate, up, down)
    return made


def layer(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return x + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down


def healed(options: LocalOptions, made: Streams) -> tuple[list[torch.Tensor], Healed]:
    random = torch.Generator().manual_seed(1)
    leaves = [torch.randn(3, WIDTH, generator=random).requires_grad_() for _ in range(3)]
    same = onto(torch.eye(WIDTH, dtype=torch.float64))
    result = heal(leaves, lambda x: layer(x, *leaves), made, same, options, tokenwise=True, seed=0)
    return leaves, result


def test_healing_moves_a_gated_layer_toward_its_teacher() -> None:
    """Three neurons learn to answer for four, gate and up rows included."""
    leaves, result = healed(LocalOptions(least_steps=300, tokens=64), streams())
    assert result.after < 0.5 * result.before
    assert all(torch.isfinite(leaf).all() for leaf in leaves)


def test_a_step_too_wide_is_taken_back() -> None:
    """With an absurd learning rate every state is worse than the first, which is kept."""
    wild = LocalOptions(learning_rate=1e4, least_steps=20, passes=0.01)
    leaves, result = healed(wild, streams())
    untouched, _ = healed(LocalOptions(least_steps=1, passes=1e-9, learning_rate=1e-30), streams())
    assert result.after == result.before
    for leaf, first in zip(leaves, untouched, strict=True):
        torch.testing.assert_close(leaf, first)


def test_what_is_held_out_judges_and_is_not_trained_on() -> None:
    """Other tokens there judge the same weights, where all that is judged is the last step."""
    options = LocalOptions(least_steps=100, tokens=64, checks=1)
    one, other = streams(), streams()
    held = sorted(other.held_out)
    # The same teacher's answers, to inputs in another order.
    for stream in (other.original_NLD, other.narrowed_NLK):
        stream[held] = stream[held].flip(1)[:, :4].repeat(1, 2, 1)
    (leaves, result), (others, otherwise) = healed(options, one), healed(options, other)
    assert result.after < result.before
    assert otherwise.after < otherwise.before
    assert result.after != otherwise.after
    for left, right in zip(leaves, others, strict=True):
        assert torch.equal(left, right)


def test_healing_is_deterministic() -> None:
    one, two = (healed(LocalOptions(least_steps=20), streams())[0] for _ in range(2))
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="must be positive"):
        LocalOptions(learning_rate=0)
