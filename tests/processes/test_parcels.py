"""What is sent is what arrives, and of what arrives only our own classes are made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dotexport.axes.plan import Plan, SizeOptions
from dotexport.embedded import MODEL_DIR
from dotexport.merging.refit import Fit
from dotexport.models.checkpoint import Checkpoint
from dotexport.narrowing.basis import Basis
from dotexport.narrowing.narrow_options import NarrowOptions
from dotexport.narrowing.prepare import take_part
from dotexport.processes.parcels import packed, unpacked
from dotexport.sizes.budget import plan


def test_a_narrowing_arrives_as_it_was_sent() -> None:
    source = Checkpoint.open(MODEL_DIR)
    decided: Plan = plan(source.config, SizeOptions(params="0.7x"))
    sent = (take_part, source, decided, frozenset({"a"}), NarrowOptions(), {3: [Path("x"), None]})
    words, tensors = packed(sent)
    assert tensors == []
    arrived = unpacked(words, tensors)
    assert arrived == sent
    assert type(arrived[2]) is Plan
    assert arrived[2].parameters_after == decided.parameters_after


@pytest.mark.parametrize("ridge", [0.1, math.inf, 1e-300])
def test_numbers_and_arrays_arrive_to_the_bit(ridge: float) -> None:
    weights_OI = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    found = unpacked(*packed(Fit(weights_OI, ridge, 1 / 3, 0.1)))
    assert (found.ridge, found.error, found.analytic_error) == (ridge, 1 / 3, 0.1)
    assert torch.equal(found.weights_OI, weights_OI)
    turned_DK = np.arange(6.0).reshape(2, 3).T[::-1]  # no order in memory that torch has
    basis = unpacked(*packed(Basis(turned_DK, "pca", 1.0)))
    assert isinstance(basis.matrix_DK, np.ndarray)
    assert np.array_equal(basis.matrix_DK, turned_DK)


@dataclass(frozen=True)
class Foreign:
    """Not one of ours."""

    number: int = 0


@pytest.mark.parametrize("value", [Foreign(), json.dumps])
def test_what_is_not_ours_is_not_sent(value: object) -> None:
    with pytest.raises(AssertionError):
        packed(value)


def test_what_is_no_value_is_not_sent() -> None:
    with pytest.raises(TypeError, match="nothing that processes tell each other"):
        packed({1, 2})


def test_what_is_not_ours_is_not_made() -> None:
    with pytest.raises(AssertionError, match="os:system"):
        unpacked(json.dumps({"kind": "function", "name": "os:system"}), [])
