"""Special tokens that are attention sinks wherever they stand, and calibration text with them.

A model of packed text learned that the token between two documents is a first token: attention
rests on it (Xiao et al., arXiv 2309.17453), and layers give it activations hundreds of times as
large as others' (massive activations: Sun et al., arXiv 2402.17762). Running text has none. What is
fitted on such text alone gives that token any size, and all that follows it in a context is lost.

Shapes: N windows, L tokens of one, B sequences of a batch, K layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.text_windows import read_tokenizer
from dotexport.narrowing.run import REHEARSED_LENGTH
from dotexport.narrowing.streams import held_out_windows

CONTEXT = 16  # tokens of text in front of one that is looked at
MASSIVE = 16.0  # times the median length of the stream at these
LOOKED_AT = 512  # special tokens, the first; some tokenizers reserve hundreds
BATCH = 128
EVERY = 4  # one window in four has one
# In the last fifth of what is read where windows are cut short: what follows has lost its past.
TAIL, READ = 5, REHEARSED_LENGTH


def sinks(source: Checkpoint, windows_NL: Tensor) -> tuple[int, ...]:
    """Special tokens whose stream is massive behind some layer, though ordinary text precedes them.

    On the CPU: it is a pass over a few hundred tokens, for which no device should read the model.

    Args:
        windows_NL: ordinary text.

    Raises:
        CheckpointError: no tokenizer, or weights that are not whole.
    """
    rows = source.config["vocab_size"]
    special = sorted(n for n in set(read_tokenizer(source.folder).all_special_ids) if n < rows)
    context_L = windows_NL[0, :CONTEXT]
    if not special or len(context_L) < CONTEXT:
        return ()
    # Each matrix is read once in a batch, so that no room for all of them is needed.
    loaded = Loaded(source, whole=False)
    found: list[int] = []
    for last_B in torch.tensor(special[:LOOKED_AT]).split(BATCH):
        tokens_BL = torch.cat([context_L.expand(len(last_B), -1), last_B[:, None]], dim=1)
        lengths_KBL = _lengths(loaded, tokens_BL)
        # The first token of any context is a sink by its place.
        ordinary_KB = lengths_KBL[:, :, 1:-1].median(dim=-1).values.clamp_min(1e-12)
        most_B = (lengths_KBL[:, :, -1] / ordinary_KB).amax(0)
        found += last_B[most_B >= MASSIVE].tolist()
    return tuple(found)


def sown(windows_NL: Tensor, found: Sequence[int], seed: int, *, turn: int = 0) -> Tensor:
    """The windows, one in EVERY with one of these tokens in the place of another: of those that are
    fitted on and of those that are held out the first, since either may be cut short.

    Args:
        turn: number of the first token that is sown, as they take turns.
    """
    count = len(windows_NL)
    held = held_out_windows(count)
    kinds = [sorted(set(range(count)) - held), sorted(held)]
    return _sown(
        windows_NL, found, enumerate(chain(*(kind[::EVERY] for kind in kinds)), turn), seed
    )


def sown_in_steps(windows_BL: Tensor, found: Sequence[int], step: int) -> Tensor:
    """The windows of a step of training, of all of which one in EVERY has one of these tokens."""
    numbers = enumerate(range(step * len(windows_BL), (step + 1) * len(windows_BL)))
    turns = ((number // EVERY, row) for row, number in numbers if number % EVERY == 0)
    return _sown(windows_BL, found, turns, step)


def _sown(
    windows_NL: Tensor, found: Sequence[int], turns: Iterable[tuple[int, int]], seed: int
) -> Tensor:
    if not found:
        return windows_NL
    length = windows_NL.shape[1]
    sown_NL, random = windows_NL.clone(), np.random.default_rng(seed)
    for turn, window in turns:
        place = random.integers(length - max(1, min(length, READ) // TAIL), length)
        sown_NL[window, place] = found[turn % len(found)]
    return sown_NL


@torch.inference_mode()
def _lengths(loaded: Loaded, tokens_BL: Tensor) -> Tensor:
    """Of the residual stream behind every layer, (K, B, L)."""
    kept: list[Tensor] = []

    def note(_module: object, _given: object, said: Tensor | tuple[Tensor, ...]) -> None:
        stream_BLD = said if isinstance(said, Tensor) else said[0]
        kept.append(stream_BLD.float().norm(dim=-1).cpu())

    layers = loaded.model.get_decoder().layers
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        loaded.hidden(tokens_BL)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)
