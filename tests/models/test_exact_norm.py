"""The one rule of narrower norms: for a stream that lies in K of D axes nothing changes at all."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dotexport.models.exact_norm import exact_norm


def norm(width: int, epsilon: float) -> LlamaRMSNorm:
    return LlamaRMSNorm(width, eps=epsilon).double()


# An epsilon of the stream's own size shows a factor of it that is wrong; 1e-6 is what models have.
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("width", [1, 5, 23, 24])
def test_a_stream_that_lies_in_k_axes_is_normed_alike_in_d_and_in_k(
    width: int, epsilon: float
) -> None:
    rng = torch.Generator().manual_seed(width)
    whole_DD = torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=torch.float64)).Q
    E_DK = whole_DD[:, :width]
    y_TK = torch.randn(50, width, generator=rng, dtype=torch.float64)
    rule = exact_norm(24, width, epsilon)
    wide_TD = norm(24, epsilon)(y_TK @ E_DK.T)
    narrow_TK = rule.gain * norm(width, rule.epsilon)(y_TK)
    # Equal in exact arithmetic; the class norms in float32, which leaves seven digits.
    torch.testing.assert_close(narrow_TK @ E_DK.T, wide_TD, rtol=1e-5, atol=1e-6)


def test_a_stream_that_is_scaled_is_normed_alike_with_the_same_epsilon() -> None:
    y_TK = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = exact_norm(24, 6, 0.5, epsilon_stays=True)
    assert rule.epsilon == 0.5
    wide_TD = norm(24, 0.5)(torch.nn.functional.pad(y_TK, (0, 18)))
    narrow_TK = rule.gain * norm(6, 0.5)(y_TK / rule.gain)
    # As above.
    torch.testing.assert_close(narrow_TK, wide_TD[:, :6], rtol=1e-5, atol=1e-6)


def test_nothing_changes_where_nothing_is_cut() -> None:
    assert exact_norm(64, 64, 1e-5) == (1.0, 1e-5)


def test_two_cuts_are_one() -> None:
    once = exact_norm(96, 24, 1e-6)
    first = exact_norm(96, 48, 1e-6)
    then = exact_norm(48, 24, first.epsilon)
    assert first.gain * then.gain == pytest.approx(once.gain)
    assert then.epsilon == pytest.approx(once.epsilon)
