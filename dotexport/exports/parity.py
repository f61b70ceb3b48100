"""Does an artifact compute what torch computes? Five ways of asking, each with its limits.

The artifact reads every prompt alone (`prefill`), appends torch's greedy tokens through its cache
(`decode`), and does both again with all prompts in one right-padded batch. Every position is held
against torch's own logits, and, because rounding hides small faults, against the artifact itself:
its cache and its padding must not change what it says. One long prompt is asked at few positions
(`far`): past sliding windows and the half of a rotary table, at the end of a context within reach.
Where every answer reads the whole model from disk, one prompt alone stands for all of them, and
what padding changes is seen against torch only.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dotexport.exports import noise
from dotexport.exports.noise import kl_divergence, log_softmax
from dotexport.exports.reference import PRECISIONS, LongText, Reference
from dotexport.exports.target import Logits, Session, Tokens

Float = NDArray[np.float64]
Said = dict[str, list[Logits]]
Covered = dict[str, list[tuple[int, slice]]]
"""Phase -> which sequences it covers, and which of their positions."""

LEAST_FLOAT = 4e-6  # of the largest logit: 32 units in the last place of float32
LEAST_HALF = 1e-3


TIMES_ROUNDING = {"int8": 4, "int3": 4, "int2": 16}
"""Of the divergence that 4 bits cost in torch, what other integers may have."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a phase may differ; None: not asked at this precision."""

    max_abs: float | None = None
    relative: float | None = None
    top1: float | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None
    consistency: float | None = None
    rounding: float | None = None
    tie: float = 0.0
    """Two tokens whose logits in torch differ by less are both right answers."""


@dataclass(frozen=True)
class Phase:
    """Artifact against torch over the positions of one phase.

    Attributes:
        max_abs: largest difference of a logit.
        relative: root mean square difference over the spread of torch's logits.
        top1: share of positions with torch's token first, ties counted as agreement.
        kl: mean KL divergence from torch's next-token distribution, in nats.
        nonfinite: NaN and infinite logits.
        consistency: like `relative`, against what the artifact said without cache and padding.
        rounding: like `relative`, against torch that rounds weights and activations too; None
            where the rounding of the artifact is not known to be the same.
    """

    max_abs: float
    relative: float
    top1: float
    kl: float
    nonfinite: int
    consistency: float
    rounding: float | None
    num_positions: int


@dataclass(frozen=True)
class Parity:
    """The verdict on one artifact; it passed when there are no problems and it ran where it is
    meant to.

    Attributes:
        unverified: why its own device was not asked, and what was looked at instead.
        text: what was held of its tokenizer, chat template and ends (text_parity.py); None: it has
            no tokenizer.
    """

    artifact: str
    target: str
    precision: str
    phases: dict[str, Phase] = field(default_factory=dict)
    perplexity_ratio: float | None = None
    limits: Limits = Limits()
    problems: tuple[str, ...] = ()
    unverified: str | None = None
    text: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return not self.problems and self.unverified is None

    @property
    def max_abs(self) -> float:
        return max((phase.max_abs for phase in self.phases.values()), default=0.0)

    @property
    def kl(self) -> float:
        return max((phase.kl for phase in self.phases.values()), default=0.0)

    @property
    def top1(self) -> float:
        return min((phase.top1 for phase in self.phases.values()), default=1.0)

    @property
    def rounding(self) -> float | None:
        """Worst phase against torch with the same rounding, where that is known."""
        known = [phase.rounding for phase in self.phases.values() if phase.rounding is not None]
        return max(known, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Figures that JSON can hold: what is not finite becomes null."""
        known: dict[str, Any] = _without_nan({**asdict(self), "passed": self.passed})
        return known


def measure(
    session: Session,
    reference: Reference,
    *,
    artifact: str,
    target: str,
    precision: str,
    exact_rounding: bool = False,
    limits: Limits | None = None,
) -> Parity:
    """Hold one loaded artifact against torch; see `Target.exact_rounding` for that option.

    Args:
        limits: None: those that follow from this reference.
    """
    limits = limits or limits_of(precision, reference, exact_rounding=exact_rounding)
    few = getattr(session, "on_disk", False)
    said = _whole_batch(session, reference) if few else _whole(session, reference)
    covered = _covered(reference, 1 if few else len(reference.sequences))
    said |= _said_alone(session, reference, covered["prefill"]) | _said_padded(session, reference)
    phases = {n: _phase(said, n, reference, rows, limits) for n, rows in covered.items()}
    ratio = _perplexity_ratio(said["whole"], reference)
    if reference.long is not None:
        phases["far"] = _far(session, reference.long, reference.num_steps, limits)
    return Parity(
        artifact=artifact,
        target=target,
        precision=precision,
        phases=phases,
        perplexity_ratio=ratio,
        limits=limits,
        problems=tuple(_problems(phases, ratio, limits)),
    )


def limits_of(precision: str, reference: Reference, *, exact_rounding: bool = False) -> Limits:
    """The gates of a precision, from the error that its rounding causes in torch with this model.

    float32: ten times what float32 itself is off float64, which sums in another order stay well
    below. Where that was not measured, 1e-3 for logits up to 32 and a spread of at least 1.

    fp16, bf16: six times what rounding all weights and all that modules say costs: runtimes that
    compute in half precision throughout were up to five times off.

    Integers: rounding weights to 16 levels costs some models little and others much; the limit is
    twice the KL divergence that the same rounding causes in torch, and never below 0.02 nats; for
    int8 four times, because some runtimes round activations of a whole text by one scale; for int3
    four and for int2 sixteen times, of which llama.cpp's mixes cost two and seven (the embedded
    model). On text sampled from the model the expected log-perplexity ratio IS the
    KL divergence; the limit adds three standard deviations for the few tokens it is measured on.
    Where the rounding rule is
    known, torch with the same rounding is the better yardstick. How a runtime rounds activations to
    int8 differs by processor, so twice the error that such rounding causes in torch is allowed
    (0.02 to 0.04 in all; the usual difference is below 0.01).
    """
    spread = noise.spread(np.concatenate(reference.logits))
    known = reference.noise.get(precision if precision in PRECISIONS else "fp32")
    if precision in ("fp16", "bf16"):
        relative = 1e-2 if precision == "fp16" else 4e-2  # 11 or 8 bits, grown through the layers
        if known:
            relative = min(relative, max(LEAST_HALF, 6 * known.relative))
        return Limits(relative=relative, top1=0.99, tie=2 * relative * spread)
    if precision.startswith("int"):
        kl = max(0.02, TIMES_ROUNDING.get(precision[:4], 2) * rounding_kl(reference))
        ratio = math.exp(kl + 3 * math.sqrt(2 * kl / _num_text_tokens(reference)))
        rounding = max(0.01, 2 * _rounding_noise(reference)) if exact_rounding else None
        return Limits(kl=kl, perplexity_ratio=ratio, consistency=0.1, rounding=rounding)
    peak = max(float(np.abs(logits).max()) for logits in reference.logits)
    tolerance = 1e-3 * min(1.0, spread) * max(1.0, peak / 32)
    if known:
        tolerance = min(tolerance, max(10 * known.max_abs, LEAST_FLOAT * max(peak, spread)))
    return Limits(max_abs=tolerance, top1=1.0, tie=2 * tolerance)


def rounding_kl(reference: Reference) -> float:
    """Mean KL divergence that 4-bit weights cause in torch itself, near or far."""
    near = kl_divergence(np.concatenate(reference.logits), np.concatenate(reference.rounded))
    long = reference.long
    far = kl_divergence(long.logits, long.rounded) if long and long.rounded is not None else 0.0
    return max(near, far)


def _rounding_noise(reference: Reference) -> float:
    """Relative error that activations in int8 cause in torch, weights being rounded already."""
    twice, once = np.concatenate(reference.rounded_twice), np.concatenate(reference.rounded)
    return _relative(twice.astype(np.float64), once.astype(np.float64))


def _whole(session: Session, reference: Reference) -> Said:
    """The artifact's logits_PV of each sequence, from one pass over it."""
    return {"whole": [session.start(tokens_L[None])[0] for tokens_L in reference.sequences]}


def _whole_batch(session: Session, reference: Reference) -> Said:
    """The same from one pass over all."""
    whole_BLV, lengths = _start_padded(session, reference.sequences)
    return {"whole": [row[:n] for row, n in zip(whole_BLV, lengths, strict=True)]}


def _said_alone(
    session: Session, reference: Reference, prompts: Sequence[tuple[int, slice]]
) -> Said:
    """Of these prompts, one after another, and of the steps behind each."""
    said: Said = {"prefill": [], "decode": []}
    for number, prompt in prompts:
        tokens_L = reference.sequences[number]
        said["prefill"].append(session.start(tokens_L[None, prompt])[0])
        rest = tokens_L[prompt.stop :]
        said["decode"].append(np.stack([session.step(token[None])[0] for token in rest]))
    return said


def _said_padded(session: Session, reference: Reference) -> Said:
    """Of all prompts side by side, and of the steps behind them."""
    pairs = zip(reference.sequences, reference.prompt_lengths, strict=True)
    prefill_BLV, lengths = _start_padded(session, [tokens_L[:n] for tokens_L, n in pairs])
    decode_NBV = [session.step(tokens_B) for tokens_B in _columns(reference)]
    return {
        "padded_prefill": [row[:n] for row, n in zip(prefill_BLV, lengths, strict=True)],
        "padded_decode": list(np.stack(decode_NBV, axis=1)),
    }


def _start_padded(session: Session, prompts: Sequence[Tokens]) -> tuple[Logits, list[int]]:
    lengths = [len(tokens_L) for tokens_L in prompts]
    batch_BL = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
    for row, tokens_L in zip(batch_BL, prompts, strict=True):
        row[: len(tokens_L)] = tokens_L
    return session.start(batch_BL, lengths), lengths


def _columns(reference: Reference) -> Iterator[NDArray[np.int64]]:
    for step in range(reference.num_steps):
        pairs = zip(reference.sequences, reference.prompt_lengths, strict=True)
        yield np.array([tokens_L[length + step] for tokens_L, length in pairs])


def _covered(reference: Reference, num_alone: int) -> Covered:
    """All sequences side by side, and the first few of them alone."""
    lengths = reference.prompt_lengths
    prompts = [(number, slice(0, length)) for number, length in enumerate(lengths)]
    rest = [(number, slice(length, None)) for number, length in enumerate(lengths)]
    alone = {"prefill": prompts[:num_alone], "decode": rest[:num_alone]}
    return alone | {"padded_prefill": prompts, "padded_decode": rest}


def _phase(
    said: Said,
    name: str,
    reference: Reference,
    rows: Sequence[tuple[int, slice]],
    limits: Limits,
) -> Phase:
    mine_PV = np.concatenate(said[name]).astype(np.float64)
    torch_PV = _rows(reference.logits, rows)
    plain_PV = _rows(said["whole"], rows)
    rounded = limits.rounding is not None
    difference_PV = np.abs(mine_PV - torch_PV)
    return Phase(
        max_abs=float(difference_PV.max()),
        relative=_relative(mine_PV, torch_PV),
        top1=_top1(torch_PV, mine_PV, limits.tie),
        kl=kl_divergence(torch_PV, mine_PV),
        nonfinite=int((~np.isfinite(mine_PV)).sum()),
        consistency=_relative(mine_PV, plain_PV),
        rounding=_relative(mine_PV, _rows(reference.rounded_twice, rows)) if rounded else None,
        num_positions=len(mine_PV),
    )


def _far(session: Session, long: LongText, num_steps: int, limits: Limits) -> Phase:
    """One long prompt, its last tokens through the cache, at few positions."""
    read = len(long.tokens) - num_steps
    start_LV = session.start(long.tokens[None, :read])[0]
    kept = [start_LV[at] for at in long.positions if at < read]
    del start_LV
    steps = [session.step(token[None])[0] for token in long.tokens[read:]]
    mine_PV = np.stack([*kept, *steps]).astype(np.float64)
    torch_PV = long.logits.astype(np.float64)
    twice = None if limits.rounding is None else long.rounded_twice
    return Phase(
        max_abs=float(np.abs(mine_PV - torch_PV).max()),
        relative=_relative(mine_PV, torch_PV),
        top1=_top1(torch_PV, mine_PV, limits.tie),
        kl=kl_divergence(torch_PV, mine_PV),
        nonfinite=int((~np.isfinite(mine_PV)).sum()),
        consistency=0.0,  # there is no second reading to compare with
        rounding=None if twice is None else _relative(mine_PV, twice.astype(np.float64)),
        num_positions=len(mine_PV),
    )


def _rows(logits: Sequence[Logits], rows: Sequence[tuple[int, slice]]) -> Float:
    found = [logits[number][positions] for number, positions in rows]
    joined: Float = np.concatenate(found).astype(np.float64)
    return joined


def _relative(mine_PV: Float, other_PV: Float) -> float:
    error = float(np.sqrt(np.square(mine_PV - other_PV).mean()))
    return error / max(noise.spread(other_PV), 1e-30)


def _top1(torch_PV: Float, mine_PV: Float, tie: float) -> float:
    chosen_P = mine_PV.argmax(-1)
    gap_P = torch_PV.max(-1) - np.take_along_axis(torch_PV, chosen_P[:, None], -1)[:, 0]
    return float((gap_P <= tie).mean())


def _perplexity_ratio(whole: Sequence[Logits], reference: Reference) -> float:
    """Perplexity of the artifact over that of torch, on the prompts sampled from the model."""
    gaps: list[Float] = []
    for i, tokens_L in enumerate(reference.sequences):
        if reference.is_text[i]:
            at = np.arange(reference.prompt_lengths[i] - 1)
            after = tokens_L[at + 1]
            mine, torchs = log_softmax(whole[i]), log_softmax(reference.logits[i])
            gaps.append(torchs[at, after] - mine[at, after])
    return float(np.exp(np.concatenate(gaps).mean()))


def _num_text_tokens(reference: Reference) -> int:
    pairs = zip(reference.prompt_lengths, reference.is_text, strict=True)
    return max(1, sum(length - 1 for length, text in pairs if text))


def _problems(phases: dict[str, Phase], ratio: float, limits: Limits) -> Iterator[str]:
    for name, phase in phases.items():
        where = name.replace("_", " ")
        if phase.nonfinite:
            yield f"{where}: {phase.nonfinite} logits are NaN or infinite"
            continue
        for what, sentence in _CEILINGS.items():
            found, limit = getattr(phase, what), getattr(limits, what)
            if limit is not None and not found <= limit:
                yield f"{where}: {sentence} {found:.3g}, above the limit of {limit:.3g}"
        if limits.top1 is not None and phase.top1 < limits.top1:
            yield (
                f"{where}: torch's token comes first at {phase.top1:.1%} of "
                f"{phase.num_positions} positions, below {limits.top1:.0%}"
            )
    limit = limits.perplexity_ratio
    if limit is not None and not ratio <= limit:
        yield f"perplexity is {ratio:.3f} times torch's, above the limit of {limit:.3f}"


_CEILINGS = {
    "max_abs": "a logit differs from torch's by",
    "relative": "relative error against torch is",
    "kl": "KL divergence from torch is",
    "rounding": "relative error against torch with the same rounding is",
    "consistency": "cache or padding changes the artifact's own logits by a relative",
}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
