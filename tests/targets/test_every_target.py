"""One suite for all targets: what is written computes what was merged, and faults are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dotexport.exports.exporting import Request
from dotexport.exports.parity import Parity, measure
from dotexport.exports.reference import Reference
from dotexport.exports.target import Logits, Session, Target, Tokens, resolve
from dotexport.exports.verifying import check
from dotexport.models.checkpoint import Checkpoint

from .conftest import assert_measured_without_torch, specs

MODELS = ["wide-heads", "tied-bf16", pytest.param("biased", marks=pytest.mark.heavy)]


def opened(exported: Callable[[str, str], Path], model: str, spec: str) -> tuple[Target, str, Path]:
    request = Request(*resolve(spec))
    out = exported(model, request.target.name)
    return request.target, request.precision, out / request.name


def verdict(session: Session, reference: Reference, target: Target, precision: str) -> Parity:
    return measure(
        session,
        reference,
        artifact="under test",
        target=target.name,
        precision=precision,
        exact_rounding=precision in target.exact_rounding,
    )


@pytest.mark.parametrize("model", MODELS)
def test_what_was_written_computes_what_torch_computes(
    spec: str, model: str, exported: Any, reference_of: Callable[[str], Reference]
) -> None:
    target, precision, folder = opened(exported, model, spec)
    parity = check(target, precision, folder, reference_of(model), artifact=spec)
    assert parity.problems == ()
    if precision in ("fp32", "as-stored"):
        assert parity.max_abs < 1e-4  # float32 differs by 1e-5 from one order of sums to another


def test_a_padded_batch_decodes_for_long_as_each_prompt_does_alone(
    spec: str, exported: Any
) -> None:
    target, precision, folder = opened(exported, "wide-heads", spec)
    session = target.open(folder, threads=1)
    rng = np.random.default_rng(0)
    lengths, steps = [7, 3, 1], 300  # past any first size of a cache
    tokens_BL = rng.integers(90, size=(3, 7 + steps))
    batch_BL = np.where(np.arange(7) < np.array(lengths)[:, None], tokens_BL[:, :7], 0)
    fed_BN = np.stack([row[n : n + steps] for row, n in zip(tokens_BL, lengths, strict=True)])

    session.start(batch_BL, lengths)
    said_BNV = np.stack([session.step(fed_B) for fed_B in fed_BN.T], axis=1)
    for row, length, said_NV in zip(tokens_BL, lengths, said_BNV, strict=True):
        alone_NV = session.start(row[None, : length + steps])[0, length:]
        spread = alone_NV.std()
        # float32 sums in another order, and so does half precision, with fewer bits; integers may
        # come with rounded activations, which flip now and then.
        tolerance = {"fp16": 1e-2, "bf16": 4e-2, "int8": 0.1, "int4": 0.1}.get(
            precision.partition("-")[0], 1e-5
        )
        error = np.sqrt(np.square(said_NV - alone_NV).mean()) / spread
        assert error < tolerance


def test_a_session_starts_afresh(spec: str, exported: Any) -> None:
    target, _, folder = opened(exported, "wide-heads", spec)
    session = target.open(folder, threads=1)
    prompt_BL, other_BL = np.array([[3, 4, 5, 6]]), np.array([[7, 8], [9, 10], [11, 12]])
    first_BLV, first_step_BV = session.start(prompt_BL).copy(), session.step(np.array([7])).copy()
    session.start(other_BL)
    session.step(np.array([1, 2, 3]))
    np.testing.assert_array_equal(session.start(prompt_BL), first_BLV)
    np.testing.assert_array_equal(session.step(np.array([7])), first_step_BV)


def test_shapes_and_types_are_those_of_the_protocol(spec: str, exported: Any) -> None:
    target, _, folder = opened(exported, "wide-heads", spec)
    session = target.open(folder)
    logits_BLV = session.start(np.array([[1, 2, 3], [4, 5, 0]]), [3, 2])
    logits_BV = session.step(np.array([6, 7]))
    assert (logits_BLV.shape, logits_BLV.dtype) == ((2, 3, 90), np.float32)
    assert (logits_BV.shape, logits_BV.dtype) == ((2, 90), np.float32)


@pytest.mark.parametrize("own", ["ort-cpu:fp32", "onnx:fp32", "openvino:fp32"])
def test_a_process_that_measures_a_runtime_of_its_own_holds_no_torch(
    own: str, exported: Any
) -> None:
    """It would be a quarter of a gigabyte in both sides of every comparison of memory."""
    if own not in specs():
        pytest.skip(f"{own} cannot be run here")
    target, _, folder = opened(exported, "wide-heads", own)
    assert_measured_without_torch(target=target.name, folder=str(folder))


class Faulty:
    """A session with something wrong in it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        return self.session.start(tokens_BL, lengths_B)

    def step(self, tokens_B: Tokens) -> Logits:
        return self.session.step(tokens_B)


class ForgetsPadding(Faulty):
    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        return self.session.start(tokens_BL)


class ForgetsTheCache(Faulty):
    def step(self, tokens_B: Tokens) -> Logits:
        return self.session.start(tokens_B[:, None])[:, 0]


class MixesUpSequences(Faulty):
    def step(self, tokens_B: Tokens) -> Logits:
        return self.session.step(tokens_B)[::-1]


class AnswersOnePositionLate(Faulty):
    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        return np.roll(self.session.start(tokens_BL, lengths_B), 1, axis=1)


class Overflows(Faulty):
    def step(self, tokens_B: Tokens) -> Logits:
        logits_BV = self.session.step(tokens_B).copy()
        logits_BV[:, 3] = np.inf
        return logits_BV


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        (ForgetsPadding, "padded decode"),
        (ForgetsTheCache, "decode"),
        (MixesUpSequences, "padded decode"),
        (AnswersOnePositionLate, "prefill"),
        (Overflows, "NaN or infinite"),
    ],
)
def test_a_faulty_runtime_is_caught(
    spec: str, fault: type[Faulty], phase: str, exported: Any, reference_of: Any
) -> None:
    target, precision, folder = opened(exported, "wide-heads", spec)
    faulty = fault(target.open(folder, threads=1))
    parity = verdict(faulty, reference_of("wide-heads"), target, precision)
    assert not parity.passed
    assert any(phase in problem for problem in parity.problems)


def test_the_artifact_of_another_model_is_caught(
    spec: str, exported: Any, reference_of: Any
) -> None:
    target, precision, folder = opened(exported, "wide-heads", spec)
    parity = check(target, precision, folder, reference_of("biased"), artifact=spec)
    assert not parity.passed


def test_a_damaged_artifact_is_a_failure_not_a_crash(
    spec: str, exported: Any, reference_of: Any, tmp_path: Path
) -> None:
    target, precision, _ = opened(exported, "wide-heads", spec)
    parity = check(target, precision, tmp_path, reference_of("wide-heads"), artifact=spec)
    assert "cannot be run" in parity.problems[0]


def test_a_target_describes_itself(spec: str, tiny_llama: Callable[[str], Path]) -> None:
    target, precision = resolve(spec)
    assert target.summary
    assert set(target.exact_rounding) <= set(target.precisions)
    assert target.problems(Checkpoint.open(tiny_llama("wide-heads")), precision) == []
