"""What the norm sites see: sinks left out, massive axes found, sites pooled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dotexport.models.checkpoint import Checkpoint
from dotexport.models.families import find_family
from dotexport.models.layers import Stock
from dotexport.models.shapes import read_sizes
from dotexport.narrowing.norm_statistics import look
from dotexport.narrowing.original import Original
from dotexport.narrowing.streams import Streams

TinyLlama = Callable[[str], Path]
CPU = torch.device("cpu")


def original(folder: Path) -> Original:
    source = Checkpoint.open(folder)
    family = find_family(source.config)
    sizes = read_sizes(family, source.config)
    return Original(source, family, sizes, Stock.of(source.config, CPU), CPU)


def streams(tokens_NL: torch.Tensor) -> Streams:
    return Streams.allocate(tokens_NL, 48, 48, device=CPU)


def quiet(stage: str, done: int, total: int) -> None:
    pass


TOKENS_NL = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))


class Loud(Original):
    """An original in which token 5 is a sink: one axis of its embedding is enormous."""

    def embedding(self) -> torch.Tensor:
        table_VD = super().embedding().clone()
        table_VD[5, 7] = 1e5
        return table_VD


def test_sinks_are_in_no_moment_and_their_axes_are_kept(tiny_llama: TinyLlama) -> None:
    plain = original(tiny_llama("wide-heads"))
    loud = Loud(plain.source, plain.family, plain.sizes, plain.stock, CPU)
    # Sinks stand last, so that no other token attends to them.
    tokens_NL = TOKENS_NL.clone()
    tokens_NL[tokens_NL == 5] = 6
    tokens_NL[:, -1] = 5
    with torch.no_grad():
        seen = look(loud, streams(tokens_NL), quiet)
        without = look(plain, streams(tokens_NL[:, :-1]), quiet)
    assert list(seen.massive) == [7]
    assert not without.massive
    np.testing.assert_allclose(seen.mean(), without.mean(), atol=1e-6)


def test_first_positions_are_in_no_moment_whatever_their_size(tiny_llama: TinyLlama) -> None:
    """At the first site, where no later token has seen them yet."""
    model, others_NL = original(tiny_llama("wide-heads")), TOKENS_NL.clone()
    others_NL[:, 0] = TOKENS_NL[:, 1]
    with torch.no_grad():
        one, other = (look(model, streams(tokens), quiet) for tokens in (TOKENS_NL, others_NL))
    torch.testing.assert_close(one.moments[0], other.moments[0], atol=1e-12, rtol=0)
    assert not torch.allclose(one.moments[1], other.moments[1], atol=1e-6)


def test_neighbouring_sites_share_a_sum_and_the_mean_stays(
    tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = original(tiny_llama("wide-heads"))
    with torch.no_grad():
        each = look(model, streams(TOKENS_NL), quiet)
        monkeypatch.setattr("dotexport.narrowing.norm_statistics.MOST_SITES", 3)
        pooled = look(model, streams(TOKENS_NL), quiet)
    assert (len(each.moments), len(pooled.moments)) == (7, 3)
    np.testing.assert_allclose(pooled.mean(), each.mean(), atol=1e-12)
