"""Quality of a model that lost tokens, beside its original: on the same text, which they read as
different tokens.

Both read the windows that the original's tokens give. What is summed is the surprise at the text
between boundaries that both tokenizations have; it is told per token of the original and per byte,
so that both sides have one unit. KL compares the next token at such boundaries, where both have
read the same text, over the tokens that both have: the original's softmax without the rest.

Shapes: N tokens of a window by the original, M by the candidate, B boundaries that both have,
C predictions at boundaries, V tokens that both have, A and O rows of the two tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from dotexport.errors import CalibrationError, DotexportError, UsageError
from dotexport.exports.quality import MOST_NATS, Progress, Quality
from dotexport.models.checkpoint import Checkpoint, read_config
from dotexport.models.documents import documents
from dotexport.models.loading import Loaded
from dotexport.models.text_options import TextOptions
from dotexport.models.text_windows import CHARACTERS, DOUBTFUL, window_length
from dotexport.vocabulary.aligning import Aligned, align
from dotexport.vocabulary.segmenting import Reading

AT_ONCE = 256  # boundaries whose predictions are compared together


def evaluate_across(
    candidate: Path,
    baseline: Path,
    text: TextOptions,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity per token of the original, bits per byte, KL and top-1 agreement.

    Raises:
        UsageError: the candidate has tokens that the original lacks, so it was not made from it.
        CalibrationError: no window of text.
        CheckpointError: the tokenizers do not read the text as the same bytes.
        UnsupportedModelError: a tokenizer that cannot be laid beside another.
        DotexportError: predictions that are NaN or infinitely bad.
    """
    ours, theirs = Reading.of(candidate), Reading.of(baseline)
    if strange := sorted(ours.ids.keys() - theirs.ids.keys()):
        raise UsageError(
            f"the vocabularies differ: {candidate} has {len(strange)} tokens that {baseline} lacks "
            f"(first {strange[0]!r}); expected the original that the candidate was made from"
        )
    windows = list(aligned_windows(theirs, ours, baseline, text))
    if not windows:
        raise CalibrationError(
            f"{text.source} is less than one window; give more text or a smaller --seqlen"
        )
    shared = sorted((theirs.ids[token], number) for token, number in ours.ids.items())
    place = torch.device(device)
    models = [Loaded(Checkpoint.open(f), dtype, device=place) for f in (baseline, candidate)]
    shared_V2 = torch.tensor(shared).to(place)
    found = []
    for number, window in enumerate(windows):
        if progress is not None:
            progress("evaluating", number, len(windows))
        found.append(_measure(models[0], models[1], window, shared_V2, theirs))
    return _quality(found)


# Windows ----------------------------------------------------------------------------------------


def aligned_windows(
    original: Reading, candidate: Reading, model: Path, options: TextOptions
) -> Iterator[Aligned]:
    """The original's windows, from the first boundary in each to the last that both have.

    They are those of `token_windows` but for a few tokens at their ends; what takes the candidate
    more tokens than the context is cut.
    """
    length = window_length(model, options)
    apart = (options.every or 1) * length
    whole = _stream(original, candidate, options, (options.skip + options.samples) * apart)
    starts = range(options.skip * apart, len(whole.one_N) - length + 1, apart)
    context = int(read_config(model).get("max_position_embeddings") or length)
    for start in starts[: options.samples]:
        inside = whole.marks_B2[:, 0] >= start
        inside &= whole.marks_B2[:, 0] <= start + length
        marks_B2 = whole.marks_B2[inside]
        fits = marks_B2[:, 1] - marks_B2[0, 1] <= context
        marks_B2 = marks_B2[fits]
        if len(marks_B2) > 2:
            (i, j), (k, m) = marks_B2[0], marks_B2[-1]
            yield Aligned(whole.one_N[i:k], whole.other_M[j:m], marks_B2 - marks_B2[0])


def _stream(original: Reading, candidate: Reading, text: TextOptions, wanted: int) -> Aligned:
    """Documents one after another, up to `wanted` tokens of the original or a few more."""
    parts: list[Aligned] = []
    count = 0
    for document in documents(text.source, text.own):
        part = _start(document, wanted - count, original, candidate)
        parts.append(part)
        count += len(part.one_N)
        if count >= wanted:
            break
    if not parts:
        raise CalibrationError(f"{text.source} holds no text; expected documents to read, in UTF-8")
    offsets = np.cumsum([[0, 0], *([len(p.one_N), len(p.other_M)] for p in parts)], axis=0)
    marks = [p.marks_B2[1:] + offset for p, offset in zip(parts, offsets, strict=False)]
    return Aligned(
        np.concatenate([p.one_N for p in parts]),
        np.concatenate([p.other_M for p in parts]),
        np.concatenate([np.zeros((1, 2), dtype=np.int64), *marks]),
    )


def _start(document: str, wanted: int, original: Reading, candidate: Reading) -> Aligned:
    """As `encode_start`: no more of a document is encoded than that takes."""
    size = CHARACTERS * (wanted + DOUBTFUL)
    while size < len(document) and len(original.encode(document[:size])) - DOUBTFUL < wanted:
        size *= 2
    one, other = original.encode(document[:size]), candidate.encode(document[:size])
    return align(one, other, original.widths, candidate.widths)


# Figures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Over one window: nats of original and candidate, and what is averaged over boundaries."""

    nats: tuple[float, float]
    tokens: tuple[int, int]
    bytes: int
    kl: float
    agreed: float
    mass: float
    boundaries: int


@torch.inference_mode()
def _measure(
    original: Loaded, candidate: Loaded, window: Aligned, shared_V2: Tensor, reading: Reading
) -> _Sums:
    device = shared_V2.device
    ids_N, ids_M = (torch.from_numpy(ids).to(device) for ids in (window.one_N, window.other_M))
    logits_NO = original.logits(ids_N[None])[0].float()
    logits_MA = candidate.logits(ids_M[None])[0].float()
    # The first stretch of text is what both have read before they predict.
    (i, j), (k, m) = window.marks_B2[1].tolist(), window.marks_B2[-1].tolist()
    nats = _nats(logits_NO, ids_N, i, k), _nats(logits_MA, ids_M, j, m)
    marks = torch.from_numpy(window.marks_B2[1:-1] - 1).to(device)
    kl = agreed = mass = 0.0
    for at_C2 in torch.split(marks, AT_ONCE):
        ours, same, kept = _compared(logits_NO[at_C2[:, 0]], logits_MA[at_C2[:, 1]], shared_V2)
        kl, agreed, mass = kl + ours, agreed + same, mass + kept
    num_bytes = int(reading.widths[window.one_N[i:k]].sum())
    return _Sums(nats, (k - i, m - j), num_bytes, kl, agreed, mass, len(marks))


def _nats(logits_LV: Tensor, ids_L: Tensor, start: int, stop: int) -> float:
    """Of the tokens from start on, before stop, each given those before it."""
    total = 0.0
    for at_C in torch.split(torch.arange(start, stop, device=ids_L.device), AT_ONCE):
        log_CV = log_softmax(logits_LV[at_C - 1], -1)
        total -= float(log_CV.gather(1, ids_L[at_C, None]).double().sum())
    return total


def _compared(
    logits_CO: Tensor, logits_CA: Tensor, shared_V2: Tensor
) -> tuple[float, float, float]:
    """Sums over predictions: KL over the tokens that both have, agreement on the likeliest of all,
    and what probability the original gives to the tokens that both have."""
    theirs_CV = log_softmax(logits_CO[:, shared_V2[:, 0]], -1)
    ours_CV = log_softmax(logits_CA[:, shared_V2[:, 1]], -1)
    kl = kl_div(ours_CV, theirs_CV, reduction="sum", log_target=True)
    mass = log_softmax(logits_CO, -1)[:, shared_V2[:, 0]].exp().sum()
    best_C = shared_V2[ours_CV.argmax(-1), 0]
    agreed = (best_C == logits_CO.argmax(-1)).sum()
    return float(kl), float(agreed), float(mass)


def _quality(sums: list[_Sums]) -> Quality:
    tokens = np.array([found.tokens for found in sums])
    nats = np.array([found.nats for found in sums])
    count, num_bytes = int(tokens[:, 0].sum()), sum(found.bytes for found in sums)
    theirs, ours = (float(total) / count for total in nats.sum(0))
    if not max(theirs, ours) < MOST_NATS:
        raise DotexportError(
            f"the models give {theirs:.0f} and {ours:.0f} nats per token, which is no prediction "
            "at all; expected finite logits of working models: do they pass `dotexport verify`?"
        )
    boundaries = sum(found.boundaries for found in sums)
    # Of windows with about as many tokens each.
    gaps = (nats[:, 1] - nats[:, 0]) / tokens[:, 0]
    error = float(gaps.std(ddof=1) / math.sqrt(len(sums))) if len(sums) > 1 else None
    bits = [float(total) / math.log(2) / num_bytes for total in nats.sum(0)]
    return Quality(
        num_windows=len(sums),
        num_tokens=count,
        perplexity=math.exp(ours),
        baseline_perplexity=math.exp(theirs),
        kl=sum(found.kl for found in sums) / boundaries,
        top1_agreement=sum(found.agreed for found in sums) / boundaries,
        log_ratio=ours - theirs,
        log_ratio_error=error,
        across={
            "bits_per_byte": bits,
            "tokens_per_byte": [int(total) / num_bytes for total in tokens.sum(0)],
            "mass_of_shared": sum(found.mass for found in sums) / boundaries,
            "boundaries": boundaries,
        },
    )
