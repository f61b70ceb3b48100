"""The two residual streams: every window is walked through once and in order, held-out ones never
share a batch or a sum with the others, and what lies in a scratch file leaves nothing behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dotexport.errors import CheckpointError
from dotexport.models.beside import Through
from dotexport.narrowing import streams
from dotexport.narrowing.norm_statistics import _moment
from dotexport.narrowing.streams import Rows, Streams, held_out_windows, inverse_rms

CPU = torch.device("cpu")
L, D, K = 64, 6, 4


def made(
    count: int = 21,
    length: int = L,
    *,
    scratch: Path | None = None,
    others: int = 0,
) -> Streams:
    """Both streams filled with noise."""
    tokens_NL = torch.arange(count * length).view(count, length)
    other_NL = -tokens_NL[:others] if others else None
    found = Streams.allocate(tokens_NL, D, K, device=CPU, scratch=scratch, other_NL=other_NL)
    random = torch.Generator().manual_seed(1)
    found.original_NLD.normal_(generator=random)
    found.narrowed_NLK.normal_(generator=random)
    return found


@pytest.mark.parametrize("length", [64, 300, 5000])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 150])
def test_batches_cover_all_windows_in_order_and_none_mixes_held_out_with_fitted(
    count: int, length: int
) -> None:
    walked = Streams(torch.zeros(count, length), *[torch.empty(0)] * 2, frozenset(), CPU)
    for seed in range(5):
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        walked.held_out = frozenset(drawn[: count // 8].tolist())
        batches = [range(rows.start, rows.stop) for rows in walked.batches()]
        assert list(itertools.chain(*batches)) == list(range(count))
        for batch in batches:
            assert len({window in walked.held_out for window in batch}) == 1
            assert len(batch) * length <= max(streams.TOKENS_PER_BATCH, length)


def test_a_batch_ends_only_where_it_is_full_or_what_follows_is_of_the_other_kind() -> None:
    """Windows of 64 tokens, 64 of them to a batch."""
    walked = made(200)
    for before, after in itertools.pairwise(walked.batches()):
        changes = (before.start in walked.held_out) != (after.start in walked.held_out)
        assert changes or before.stop - before.start == streams.TOKENS_PER_BATCH // L


@pytest.mark.parametrize("metric", [False, True])
def test_moments_of_both_parts_are_sums_over_their_own_windows(metric: bool) -> None:
    """Directly: one product over all tokens of the windows of a part."""
    walked = made()
    root_DD = torch.randn(D, D, generator=torch.Generator().manual_seed(2)).double()
    metric_DD = root_DD.T @ root_DD if metric else None

    def read(rows: Rows) -> tuple[Tensor, Tensor]:
        return walked.narrowed(rows), walked.original(rows)

    parts = walked.moments(read, metric_OO=metric_DD)
    held = sorted(walked.held_out)
    fitted = [n for n in range(21) if n not in walked.held_out]
    assert len(held) == 2
    for sums, windows in zip(parts, (fitted, held), strict=True):
        z_TK = walked.narrowed_NLK[windows].flatten(0, 1).double()
        t_TD = walked.original_NLD[windows].flatten(0, 1).double()
        weighed_TD = t_TD if metric_DD is None else t_TD @ metric_DD
        # Products of a batch are float32: off by its rounding, of sums as large as a diagonal's.
        torch.testing.assert_close(sums.inputs.full(), z_TK.T @ z_TK, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(sums.cross_OI, t_TD.T @ z_TK, rtol=1e-6, atol=1e-3)
        assert sums.targets == pytest.approx(float((weighed_TD * t_TD).sum()), rel=1e-6)
        assert sums.count == len(windows) * L


def test_of_either_kind_a_share_is_held_out_and_both_judge_as_much() -> None:
    """One window of the other text against two: each of its tokens counts twice."""
    walked = made(others=9)
    assert walked.other == set(range(21, 30))
    assert walked.of_its_kind == held_out_windows(21)
    assert walked.held_out - walked.of_its_kind == {21 + n for n in held_out_windows(9)}
    assert torch.equal(walked.windows_NL[21:], -walked.windows_NL[:9])
    train, held = walked.moments(lambda rows: (walked.narrowed(rows), walked.original(rows)))
    assert (train.count, held.count) == ((19 + 8) * L, 4 * L)
    grams = []
    for windows in (walked.of_its_kind, walked.other & walked.held_out):
        z_TK = walked.narrowed_NLK[sorted(windows)].flatten(0, 1).double()
        grams.append(z_TK.T @ z_TK)
    # Products of a batch are float32.
    wanted = grams[0] + grams[1] * 2
    torch.testing.assert_close(held.inputs.full(), wanted, rtol=1e-6, atol=1e-3)


def test_other_text_too_short_to_hold_any_out_is_fitted_on() -> None:
    walked = made(others=1)
    assert walked.held_out == held_out_windows(21)
    train, held = walked.moments(lambda rows: (walked.narrowed(rows), walked.original(rows)))
    assert (train.count, held.count) == (20 * L, 2 * L)


def test_a_part_of_the_streams_has_windows_of_every_kind() -> None:
    part = made(40, others=24).some(9, 8)
    assert len(part.of_its_kind) == len(part.other & part.held_out) == 2
    assert len(part.judging - part.other) == len(part.judging & part.other) == 6
    assert all(bool((part.windows_NL[n] <= 0).all()) for n in part.other)
    assert len(part.other - part.held_out - part.judging) == 4
    assert len(part.windows_NL) == 9 + 4 + 12
    few = made(40, others=3).some(9, 8)  # one of them held out, and both others fitted on
    assert (len(few.other), len(few.windows_NL)) == (3, 9 + 2 + 6 + 1)
    assert few.judging & few.other == few.held_out & few.other
    single = made(40, others=1).some(9, 8)  # of which nothing can be held out
    assert single.other - single.held_out == single.other
    assert len(single.judging) == 6


def test_windows_that_judge_are_neither_fitted_on_nor_choose() -> None:
    part = made(40, others=24).some(9, 4)
    part.narrowed_NLK.normal_()
    part.original_NLD.normal_()
    read = lambda rows: (part.narrowed(rows), part.original(rows))  # noqa: E731
    before = [moments.inputs.full() for moments in part.moments(read)]
    seen = {n for rows in part.choosing() for n in range(rows.start, rows.stop)}
    assert seen == set(range(len(part.windows_NL))) - part.judging
    basis = _moment(part, lambda x_BLD: x_BLD)[0]
    for stream_NLX in (part.narrowed_NLK, part.original_NLD):
        stream_NLX[sorted(part.judging)] *= torch.arange(1, 1 + stream_NLX.shape[-1])
    assert torch.equal(_moment(part, lambda x_BLD: x_BLD)[0], basis)
    for found, wanted in zip(part.moments(read), before, strict=True):
        assert torch.equal(found.inputs.full(), wanted)


def test_held_out_windows_that_choose_nothing_judge() -> None:
    """All but the last two of six, where all others are fitted on."""
    part = made(48).some(42, 8)
    assert sorted(part.held_out) == [46, 47]
    assert sorted(part.judging) == [42, 43, 44, 45]


def test_of_a_single_window_nothing_is_held_out_and_it_judges_itself() -> None:
    alone = made(1)
    train, held = alone.moments(lambda rows: (alone.narrowed(rows), alone.original(rows)))
    assert not alone.held_out
    assert held is train
    assert train.count == L


@pytest.mark.parametrize("stream", ["original", "narrowed"])
def test_advancing_a_stream_steps_every_window_once_and_leaves_the_other_stream(
    stream: str,
) -> None:
    """The step also shows where a window begins, so a batch must hold whole ones."""
    walked, untouched = made(150), made(150)

    def step(x_BLX: Tensor) -> Tensor:
        return 2 * x_BLX + x_BLX[:, :1]

    advance: Callable[[Through], None] = getattr(walked, f"advance_{stream}")
    advance(lambda x_BLX, beside: step(x_BLX))
    # The same operations on the same float32 numbers.
    for name, wanted in (
        ("original", untouched.original_NLD),
        ("narrowed", untouched.narrowed_NLK),
    ):
        found = getattr(walked, name)(slice(None))
        assert torch.equal(found, step(wanted) if name == stream else wanted)


@pytest.mark.parametrize("count", [2, 7, 8, 15, 16, 150])
def test_one_window_in_eight_is_held_out_behind_all_that_are_fitted(count: int) -> None:
    """One that lies between fitted windows is of their article, and flatters them."""
    held = held_out_windows(count)
    assert len(held) == max(1, count // 8)
    assert held == set(range(count)[-len(held) :])
    assert made(count).held_out == held


@pytest.mark.parametrize(
    ("asked", "fitted", "judging"),
    [(1, 1, 6), (4, 4, 6), (38, 38, 6), (40, 40, 6), (42, 42, 4), (90, 42, 4)],
)
def test_some_windows_keep_their_parts_apart_and_share_no_memory(
    asked: int, fitted: int, judging: int
) -> None:
    """48 windows, 6 of them held out: those asked for to fit on, and the last of the others."""
    whole = made(48)
    kept = whole.original_NLD.clone()
    some = whole.some(asked, 8)
    assert len(some.windows_NL) == fitted + judging + 2
    origin = [int(first) // L for first in some.windows_NL[:, 0]]  # tokens are numbered through
    assert origin == [*range(fitted), *range(46 - judging, 48)]
    for window, source in enumerate(origin):
        assert torch.equal(some.windows_NL[window], whole.windows_NL[source])
        assert (window in some.held_out) == (source >= 46)
        assert (window in some.judging) == (46 - judging <= source < 46)
    some.original_NLD.fill_(1.0)
    some.narrowed_NLK.fill_(1.0)
    assert some.original_NLD.shape == (fitted + judging + 2, L, D)
    assert some.narrowed_NLK.shape == (fitted + judging + 2, L, K)
    assert torch.equal(whole.original_NLD, kept)


def test_a_scratch_file_holds_what_memory_would_and_leaves_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    mapped, plain = made(scratch=tmp_path), made()
    assert list(tmp_path.iterdir()) == []
    shape_DK = (mapped.original_NLD.shape, mapped.narrowed_NLK.shape)
    assert shape_DK == ((21, L, D), (21, L, K))
    maps = Path("/proc/self/maps")
    if maps.exists():  # both streams are files that are gone, and pages go to them, not to memory
        ours = [line for line in maps.read_text().splitlines() if f"{tmp_path}/" in line]
        assert len(ours) == 2
        assert all(line.split()[1] == "rw-s" for line in ours)
    for found in (mapped, plain):
        found.advance_original(lambda x, beside: torch.tanh(x))
    assert torch.equal(mapped.original_NLD, plain.original_NLD)
    assert torch.equal(mapped.narrowed_NLK, plain.narrowed_NLK)


def test_what_fits_into_memory_touches_no_disk(tmp_path: Path) -> None:
    assert made(scratch=tmp_path / "never made").original_NLD.shape == (21, L, D)


@pytest.mark.parametrize("stream", ["original_NLD", "narrowed_NLK"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("held_out", [False, True])
def test_one_activation_that_overflowed_is_refused_wherever_it_is(
    stream: str, value: float, held_out: bool
) -> None:
    walked = made()
    window = next(n for n in range(21) if (n in walked.held_out) == held_out)
    getattr(walked, stream)[window, 5, 2] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*convert it to bfloat16 first"):
        walked.moments(lambda rows: (walked.narrowed(rows), walked.original(rows)))


def test_one_over_the_size_makes_tokens_one_size_and_keeps_empty_ones_finite() -> None:
    x_BLD = made().original_NLD * 1e3
    x_BLD[0, 0] = 0.0
    scaled_BLD = x_BLD * inverse_rms(x_BLD)
    size_BL = scaled_BLD.square().mean(-1)
    assert size_BL[0, 0] == 0.0
    size_BL[0, 0] = 1.0
    # float32 rounds a square root and a product of six numbers.
    torch.testing.assert_close(size_BL, torch.ones(21, L), rtol=1e-5, atol=0)
