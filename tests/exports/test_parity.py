"""Parity is a measurement, and this measures the instrument: a session that says what the
reference says passes with zeros, every planted error is found in the phase where it was planted
and named there, and each figure is the one of its definition.

Shapes: P positions, V vocabulary, B sequences, L tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from dotexport.exports.noise import Noise
from dotexport.exports.parity import Limits, Parity, limits_of, measure
from dotexport.exports.reference import (
    LONGEST,
    NUM_STEPS,
    LongText,
    Reference,
    _long_text,
    _reach,
    _sampled_prompts,
    compute_reference,
)
from dotexport.exports.target import Logits, Tokens
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded

VOCAB, STEPS, PROMPTS = 16, 3, (9, 5, 1)
PHASES = ("prefill", "decode", "padded prefill", "padded decode")
Rows = NDArray[np.float64]
Change = Callable[[Logits], Logits]
RNG = np.random.default_rng(0)
LOGITS = tuple(RNG.normal(size=(n + STEPS, VOCAB)).astype(np.float32) for n in PROMPTS)
TORCH = Reference(
    sequences=tuple(RNG.permutation(VOCAB)[: n + STEPS] for n in PROMPTS),
    prompt_lengths=PROMPTS,
    is_text=(True, False, False),
    logits=LOGITS,
    rounded=tuple(one * np.float32(1.05) for one in LOGITS),
    rounded_twice=tuple(one * np.float32(1.06) for one in LOGITS),
)


class Artifact:
    """Says what the reference says but where a change was planted, and NaN at padding."""

    def __init__(self, said: tuple[Logits, ...], changes: dict[str, Change]) -> None:
        self.changes, self.answers = changes, {}
        for tokens, logits_LV in zip(TORCH.sequences, said, strict=True):
            for at, logits_V in enumerate(logits_LV):
                self.answers[tuple(tokens[: at + 1].tolist())] = logits_V

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        lengths = lengths_B or [tokens_BL.shape[1]] * len(tokens_BL)
        self.read = [row[:n].tolist() for row, n in zip(tokens_BL, lengths, strict=True)]
        self.padded = "padded " if len(self.read) > 1 else ""
        phase = "prefill" if tokens_BL.shape[1] in PROMPTS else "whole"
        logits_BLV = np.full((*tokens_BL.shape, VOCAB), np.nan, dtype=np.float32)
        for row, tokens in zip(logits_BLV, self.read, strict=True):
            row[: len(tokens)] = [self.answers[tuple(tokens[: n + 1])] for n in range(len(tokens))]
        return self.changes.get(f"{self.padded}{phase}", np.copy)(logits_BLV)

    def step(self, tokens_B: Tokens) -> Logits:
        for tokens, token in zip(self.read, tokens_B, strict=True):
            tokens.append(int(token))
        logits_BV = np.stack([self.answers[tuple(tokens)] for tokens in self.read])
        return self.changes.get(f"{self.padded}decode", np.copy)(logits_BV)


def measured(
    precision: str,
    changes: dict[str, Change] | None = None,
    *,
    said: tuple[Logits, ...] = LOGITS,
    torchs: Reference = TORCH,
    exact: bool = False,
) -> Parity:
    mine, name = Artifact(said, changes or {}), {"artifact": "a", "target": "t"}
    return measure(mine, torchs, **name, precision=precision, exact_rounding=exact)


def plus(amount: float, logits: Logits) -> Logits:
    """One logit of an answer changes, at its first position."""
    logits[(0,) * (logits.ndim - 1) + (3,)] += amount
    return logits


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4", "int8"])
def test_what_says_the_same_as_torch_passes_with_zeros(precision: str) -> None:
    parity = measured(precision)
    assert parity.passed
    assert (parity.max_abs, parity.kl, parity.top1, parity.perplexity_ratio) == (0, 0, 1, 1)
    assert not replace(parity, unverified="no device here").passed


PLANTED: dict[str, tuple[str, Change, str]] = {
    "one logit": ("fp32", partial(plus, 2e-3), "a logit differs from torch's by 0.002, above"),
    "one NaN": ("fp32", partial(plus, math.nan), " logits are NaN or infinite"),
    "one infinity": ("int4", partial(plus, math.inf), " logits are NaN or infinite"),
    "other logits": ("bf16", lambda x: x * 1.05, "relative error against torch is 0.05"),
    "another token": ("fp32", lambda x: -x, "torch's token comes first at 0.0% of"),
    "another distribution": ("int4", lambda x: -x, "KL divergence from torch is"),
    "a shift": ("int4", lambda x: x + 1, "cache or padding changes the artifact's own logits by"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_named_in_its_phase_and_in_no_other(error: str, phase: str) -> None:
    precision, change, said = PLANTED[error]
    parity = measured(precision, {phase: change})
    assert not parity.passed
    assert any(said in problem for problem in parity.problems)
    assert {problem.partition(":")[0] for problem in parity.problems} == {phase}
    json.dumps(parity.as_dict(), allow_nan=False)  # which has no word for what is not finite


def test_what_is_wrong_with_and_without_cache_alike_is_found_too() -> None:
    shifted = tuple(one + 1 for one in LOGITS)  # which changes no probability
    assert measured("int4", said=shifted).passed
    problems = measured("int4", said=shifted, exact=True).problems
    assert [text.partition(" is ")[0] for text in problems] == [
        f"{phase}: relative error against torch with the same rounding" for phase in PHASES
    ]
    *_, last = measured("int4", said=tuple(5 * one for one in LOGITS)).problems
    assert re.match(r"perplexity is [\d.]+ times torch's, above the limit of 1\.", last)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("share", "share_first"), [(0.9, 1.0), (1.1, 0.8)])
def test_another_token_is_wrong_only_beyond_a_tie(
    precision: str, share: float, share_first: float
) -> None:
    # By a tenth: to move a logit moves the spread, and so the tie, by less than that.
    gap = share * limits_of(precision, TORCH).tie
    close, ahead = (tuple(one.copy() for one in LOGITS) for _ in range(2))
    for torch_LV, mine_LV in zip(close, ahead, strict=True):
        first, second = torch_LV[0].argsort()[:-3:-1]
        torch_LV[0, second] = torch_LV[0, first] - gap
        mine_LV[0, second] = mine_LV[0, first] + 1e-4
    parity = measured(precision, said=ahead, torchs=replace(TORCH, logits=close))
    assert parity.top1 == share_first  # three first positions of fifteen
    assert any("torch's token comes first" in text for text in parity.problems) == (share > 1)


def relative(mine_PV: Rows, other_PV: Rows) -> float:
    """Root mean square difference over the spread around the mean of each position."""
    return float(np.sqrt(np.square(mine_PV - other_PV).mean() / other_PV.var(-1).mean()))


def kl(torch_PV: Rows, mine_PV: Rows) -> float:
    return float(entropy(softmax(torch_PV, -1), softmax(mine_PV, -1), axis=-1).mean())


def test_figures_are_those_of_their_definitions() -> None:
    waved = tuple(one + np.float32(0.3) * np.sin(37 * one) for one in LOGITS)
    more = dict.fromkeys(PHASES, lambda x: x * 1.5)
    parity = measured("int4", more, said=waved, exact=True)
    for name, phase in parity.phases.items():
        part = slice(-STEPS, None) if name.endswith("decode") else slice(-STEPS)
        torch_PV, twice_PV, alone_PV = (
            np.concatenate([one[part] for one in rows]).astype(np.float64)
            for rows in (LOGITS, TORCH.rounded_twice, waved)
        )
        mine_PV = 1.5 * alone_PV
        expected = {
            "max_abs": np.abs(mine_PV - torch_PV).max(),
            "relative": relative(mine_PV, torch_PV),
            "top1": (mine_PV.argmax(-1) == torch_PV.argmax(-1)).mean(),
            "kl": kl(torch_PV, mine_PV),
            "consistency": relative(mine_PV, alone_PV),
            "rounding": relative(mine_PV, twice_PV),
            "num_positions": 9 if name.endswith("decode") else 15,
        }
        # The artifact answers in float32, which has 24 bits.
        assert asdict(phase) == pytest.approx(expected | {"nonfinite": 0}, rel=1e-6)
    phases = parity.phases.values()
    assert 0 < parity.top1 == min(phase.top1 for phase in phases) < 1
    assert parity.kl == max(phase.kl for phase in phases)
    lost = [
        log_softmax(LOGITS[0][p])[token] - log_softmax(waved[0][p])[token]
        for p, token in enumerate(TORCH.sequences[0][1 : PROMPTS[0]])  # the prompt of text
    ]
    assert parity.perplexity_ratio == pytest.approx(np.exp(np.mean(lost)), rel=1e-6)


@pytest.mark.parametrize(("size", "limit"), [(0.1, 1e-4), (1, 1e-3), (32, 1e-3), (96, 3e-3)])
def test_limits_follow_logits_that_are_small_or_large(size: float, limit: float) -> None:
    """Logits of plus and minus `size` have it as their spread and as their peak."""
    signs = tuple(size * np.sign(one - np.median(one, -1, keepdims=True)) for one in LOGITS)
    reference = replace(TORCH, logits=signs)
    near: Any = pytest.approx
    found = limits_of("fp32", reference)
    assert found == Limits(max_abs=near(limit), top1=1.0, tie=near(2 * limit))
    for precision, share in (("fp16", 1e-2), ("bf16", 4e-2)):
        wide = Limits(relative=share, top1=0.99, tie=near(2 * share * size))
        assert limits_of(precision, reference) == wide


def test_limits_of_int4_are_what_the_same_rounding_costs_in_torch() -> None:
    exact = replace(TORCH, rounded=LOGITS, rounded_twice=LOGITS)
    rough = replace(exact, rounded=tuple(-one for one in LOGITS))
    all_PV = np.concatenate(LOGITS).astype(np.float64)
    for reference, most in ((exact, 0.02), (rough, 2 * kl(all_PV, -all_PV))):
        found = limits_of("int4", reference)
        # Eight tokens of text are predicted: three standard deviations of their mean.
        ratio = math.exp(most + 3 * math.sqrt(2 * most / 8))
        assert (found.kl, found.perplexity_ratio) == pytest.approx((most, ratio))
        assert (found.consistency, found.rounding) == (0.1, None)
    noise = [limits_of("int4", one, exact_rounding=True).rounding for one in (exact, rough)]
    assert noise == [0.01, pytest.approx(2 * relative(all_PV, -all_PV))]


# The error of a precision, and what lies far ----------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("fp32", {"max_abs": 10 * 3e-5}),
        ("as-stored", {"max_abs": 10 * 3e-5}),
        ("fp16", {"relative": 6 * 1e-3}),
        ("bf16", {"relative": 6 * 4e-3}),
    ],
)
def test_limits_are_a_small_multiple_of_what_a_precision_costs_in_torch(
    precision: str, said: dict[str, float]
) -> None:
    noise = {
        "fp32": Noise(3e-5, 0),
        "fp16": Noise(1, 1e-3),
        "bf16": Noise(1, 4e-3),
    }
    limits = limits_of(precision, replace(TORCH, noise=noise))
    assert {name: getattr(limits, name) for name in said} == pytest.approx(said)


def test_int8_is_allowed_twice_what_int4_is() -> None:
    rough = replace(TORCH, rounded=tuple(-one for one in LOGITS), rounded_twice=LOGITS)
    four, eight = (limits_of(precision, rough).kl for precision in ("int4", "int8"))
    assert four is not None
    assert eight == pytest.approx(2 * four)


def test_a_measured_error_never_loosens_a_limit() -> None:
    noise = dict.fromkeys(("fp32", "fp16", "bf16"), Noise(9, 9))
    for precision in noise:
        wide, usual = limits_of(precision, replace(TORCH, noise=noise)), limits_of(precision, TORCH)
        for name in ("max_abs", "relative"):
            assert getattr(wide, name) == getattr(usual, name)


FAR = RNG.permutation(VOCAB * 3) % VOCAB


class Distant(Artifact):
    """Right near by; far away it says what it is told to."""

    def __init__(self, far_LV: Logits) -> None:
        super().__init__(LOGITS, {})
        self.far_LV, self.at = far_LV, 0

    def start(self, tokens_BL: Tokens, lengths_B: Sequence[int] | None = None) -> Logits:
        self.at = tokens_BL.shape[1] if tokens_BL.shape[1] > max(map(len, LOGITS)) else 0
        return self.far_LV[None, : self.at] if self.at else super().start(tokens_BL, lengths_B)

    def step(self, tokens_B: Tokens) -> Logits:
        if not self.at:
            return super().step(tokens_B)
        self.at += 1
        return self.far_LV[None, self.at - 1]


@pytest.mark.parametrize("wrong", [None, 20, len(FAR) - 1])
def test_a_position_far_away_is_asked_too(wrong: int | None) -> None:
    said_LV = RNG.normal(size=(len(FAR), VOCAB)).astype(np.float32)
    positions = (12, 20, *range(len(FAR) - NUM_STEPS, len(FAR)))
    long = LongText(FAR, positions, said_LV[list(positions)].copy())
    if wrong is not None:
        said_LV[wrong, 3] += 0.1
    parity = measure(
        Distant(said_LV), replace(TORCH, long=long), artifact="a", target="t", precision="fp32"
    )
    assert parity.phases["far"].num_positions == len(positions)
    assert parity.passed == (wrong is None)
    assert [problem.partition(":")[0] for problem in parity.problems] == ["far"] * bool(wrong)


def test_the_reference_measures_its_own_rounding_and_is_left_as_it_was(
    tiny_llama: Callable[[str], Path],
) -> None:
    checkpoint = Checkpoint.open(tiny_llama("wide-heads"))
    reference = compute_reference(checkpoint)
    noise = reference.noise
    assert 0 < noise["fp32"].max_abs < 1e-4
    assert noise["fp32"].relative < noise["fp16"].relative < noise["bf16"].relative
    # What comes after the roundings is not rounded by them.
    plain = compute_reference(checkpoint, precisions=())
    for name in ("logits", "rounded", "rounded_twice"):
        for one, other in zip(getattr(reference, name), getattr(plain, name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert plain.noise == {}


def test_the_long_sequence_ends_with_the_context_and_goes_past_the_window() -> None:
    def far(reach: int = 0, **config: int | None) -> tuple[int, tuple[int, ...]]:
        asked = SimpleNamespace(**{"vocab_size": 90, "sliding_window": None} | config)
        tokens, positions = _long_text(asked, TORCH.sequences, TORCH.num_steps, reach)
        return len(tokens), positions

    assert far(max_position_embeddings=512)[0] == 512
    assert far(max_position_embeddings=512)[1][-1] == 511
    assert {255, 256, 257} < set(far(max_position_embeddings=512)[1])
    assert far(max_position_embeddings=1 << 17)[0] == LONGEST
    assert far(5000, max_position_embeddings=1 << 17)[0] == 5000
    assert far(5000, max_position_embeddings=4096)[1][-1] == 4095
    length, positions = far(max_position_embeddings=8192, sliding_window=2048)
    assert length > 2048
    assert {2047, 2048, 2049} < set(positions)
    assert far(max_position_embeddings=8)[1] == ()
    assert far(max_position_embeddings=1 << 17, vocab_size=1 << 20)[0] == 128


def test_a_small_model_is_asked_to_the_end_of_its_context(
    tiny_llama: Callable[[str], Path],
) -> None:
    model = Loaded(Checkpoint.open(tiny_llama("wide-heads"))).model
    assert _reach(model) > 4096  # which is more than the least for all models
    model.config.num_hidden_layers = 10_000
    assert _reach(model) < LONGEST


@pytest.mark.parametrize("start", [10**30, -1, 90])
def test_a_start_that_is_no_token_of_the_model_does_not_matter(
    start: int, tiny_llama: Callable[[str], Path]
) -> None:
    loaded = Loaded(Checkpoint.open(tiny_llama("wide-heads")))
    prompts = []
    for number in (start, None):
        loaded.model.config.bos_token_id = number
        prompts.append(_sampled_prompts(loaded, (4, 3), seed=0))
    for mine, other in zip(*prompts, strict=True):
        np.testing.assert_array_equal(mine, other)
