"""Shrink quality: how well a model predicts text, and how far it moved from the original.

Shapes: N windows, B of them in a batch, L tokens, P = L - 1 predictions of a window,
C predictions in a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss

from dotexport.errors import CalibrationError, CheckpointError, DotexportError, UsageError
from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.vocabulary.segmenting import have_one_vocabulary

TOKENS_PER_BATCH = 4096  # which decides how many windows run at once
CHUNK_BYTES = 128 << 20  # of one chunk's logits; a few of these exist at a time
MOST_NATS = 700.0  # exp of more is infinite

Progress = Callable[[str, int, int], None]
"""Told what is being done, windows done, windows in all."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well the candidate predicts, and beside it the original, on the same tokens.

    Attributes:
        num_windows, num_tokens: windows, and tokens predicted in them.
        perplexity: exp of the mean nats per predicted token.
        baseline_perplexity: that of the original; None without one, as are all below.
        kl: mean over predictions of KL(original || candidate), in nats.
        top1_agreement: share of predictions where both hold the same token for most likely.
        log_ratio: log(perplexity / baseline_perplexity).
        log_ratio_error: its standard error, paired: from the differences window by window, as
            what makes a window hard makes it hard for both.
        across: where the two have different vocabularies, what else is said of the same text
            (two_vocabularies.py): bits and tokens per byte of the original and of the candidate,
            the probability that the original gives to the tokens that both have, and at how many
            boundaries KL and agreement were taken. Perplexities are then per token of the original.
    """

    num_windows: int
    num_tokens: int
    perplexity: float
    baseline_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    log_ratio: float | None = None
    log_ratio_error: float | None = None
    across: Mapping[str, Any] | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity of the candidate over that of the original."""
        return None if self.log_ratio is None else math.exp(self.log_ratio)

    def as_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "ratio": self.ratio}
        return found if self.across else {k: v for k, v in found.items() if k != "across"}


def evaluate(
    candidate: Path,
    baseline: Path | None,
    windows_NL: torch.Tensor,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity, KL divergence and top-1 agreement of stock checkpoints, in one pass.

    Both run through transformers, without remote code; what does not fit into memory is
    read part by part for every batch (models/loading.py).

    Args:
        candidate, baseline: checkpoint folders; without a baseline only perplexity is measured.
        windows_NL: token ids, at least two in each window; every one but the first is predicted.
        device: where both models run.
        dtype: what they compute in.
        batch: windows at once; None: as many as have TOKENS_PER_BATCH tokens.
        progress: called before each batch.

    Raises:
        UsageError: the two models have different vocabularies (two_vocabularies.py compares them).
        CalibrationError: windows that cannot be evaluated.
        CheckpointError: a folder that is no complete checkpoint.
        DotexportError: a model whose predictions are NaN or infinitely bad.
    """
    checkpoints = [Checkpoint.open(folder) for folder in (candidate, baseline) if folder]
    vocabulary = _shared_vocabulary(checkpoints)
    _check_windows(windows_NL, vocabulary)
    place = torch.device(device)
    models = [Loaded(checkpoint, dtype, device=place) for checkpoint in checkpoints]
    batch = batch or max(1, TOKENS_PER_BATCH // windows_NL.shape[1])
    sums = []
    for number, windows_BL in enumerate(torch.split(windows_NL, batch)):
        if progress is not None:
            progress("evaluating", number * batch, len(windows_NL))
        sums.append(_evaluate_batch(models, windows_BL.to(place)))
    return _quality(torch.cat(sums), predictions=windows_NL.shape[1] - 1, paired=len(models) == 2)


def predictions(
    ours_CV: torch.Tensor, theirs_CV: torch.Tensor, next_C: torch.Tensor
) -> torch.Tensor:
    """Per prediction: nats of the candidate, nats of the original, KL, and whether both agree."""
    ours_CV, theirs_CV = log_softmax(ours_CV.float(), -1), log_softmax(theirs_CV.float(), -1)
    ours_C, theirs_C = (nll_loss(p_CV, next_C, reduction="none") for p_CV in (ours_CV, theirs_CV))
    kl_C = kl_div(ours_CV, theirs_CV, reduction="none", log_target=True).sum(-1)
    agree_C = ours_CV.argmax(-1) == theirs_CV.argmax(-1)
    return torch.stack([ours_C, theirs_C, kl_C, agree_C.float()], dim=-1).double()


@torch.inference_mode()
def _evaluate_batch(models: Sequence[Loaded], windows_BL: torch.Tensor) -> torch.Tensor:
    """Sums over the predictions of each window: B rows of what `predictions` gives."""
    # The last token has no next one to predict.
    hidden = [model.hidden(windows_BL[:, :-1]).flatten(0, 1) for model in models]
    next_C = windows_BL[:, 1:].reshape(-1)
    step = max(1, CHUNK_BYTES // (4 * models[0].model.config.vocab_size))
    rows = []
    for start in range(0, len(next_C), step):
        some = slice(start, start + step)
        pairs = zip(models, hidden, strict=True)
        said = [model.head(hidden_TD[None, some])[0] for model, hidden_TD in pairs]
        rows.append(predictions(said[0], said[-1], next_C[some]))
    rows_T4 = torch.cat(rows)
    return rows_T4.reshape(len(windows_BL), -1, rows_T4.shape[-1]).sum(1).cpu()


def _quality(sums_N4: torch.Tensor, *, predictions: int, paired: bool) -> Quality:
    num_windows = len(sums_N4)
    num_tokens = num_windows * predictions
    ours, theirs, kl, agree = (sums_N4.sum(0) / num_tokens).tolist()
    candidate = Quality(
        num_windows=num_windows,
        num_tokens=num_tokens,
        perplexity=_perplexity(ours, "candidate"),
    )
    if not paired:
        return candidate
    gap_N = (sums_N4[:, 0] - sums_N4[:, 1]) / predictions
    return replace(
        candidate,
        baseline_perplexity=_perplexity(theirs, "baseline"),
        kl=kl,
        top1_agreement=agree,
        log_ratio=ours - theirs,
        log_ratio_error=float(gap_N.std() / math.sqrt(num_windows)) if num_windows > 1 else None,
    )


def _perplexity(nats: float, name: str) -> float:
    if not nats < MOST_NATS:
        raise DotexportError(
            f"the {name} gives {nats:.0f} nats per token, which is no prediction at all; expected "
            "finite logits of a working model: does it pass `dotexport verify`?"
        )
    return math.exp(nats)


def _shared_vocabulary(checkpoints: list[Checkpoint]) -> int:
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in checkpoints]
    if len(set(sizes)) > 1:
        named = " and ".join(
            f"{checkpoint.folder} has {size}"
            for checkpoint, size in zip(checkpoints, sizes, strict=True)
        )
        raise UsageError(
            f"the vocabularies differ: {named}; expected the original that the candidate was "
            "made from, as the two are compared token by token; `dotexport eval` compares one that "
            "lost tokens with its original on the same text"
        )
    if len(sizes) == 2 and not have_one_vocabulary(*(c.folder for c in checkpoints)):
        named = " and ".join(str(checkpoint.folder) for checkpoint in checkpoints)
        raise UsageError(
            f"{named} have {sizes[0]} rows each, and other tokens in them; `dotexport eval` "
            "compares such models on the same text"
        )
    if not isinstance(sizes[0], int):
        raise CheckpointError(
            f"{checkpoints[0].folder}/config.json has no vocab_size; expected the config.json of "
            "a causal language model"
        )
    return sizes[0]


def _check_windows(windows_NL: torch.Tensor, vocabulary: int) -> None:
    if windows_NL.ndim != 2 or not len(windows_NL) or windows_NL.shape[1] < 2:
        raise CalibrationError(
            f"windows have shape {tuple(windows_NL.shape)}; expected one window or more, of two "
            "tokens or more each"
        )
    low, high = int(windows_NL.min()), int(windows_NL.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"windows hold token ids from {low} to {high}, and the models know 0 to "
            f"{vocabulary - 1}; encode the text with the tokenizer of the original"
        )
