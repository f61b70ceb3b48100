"""Special tokens that are attention sinks wherever they stand, and calibration text with them.

A model of packed text learned that the token between two documents is a first token: attention
rests on it (Xiao et al., arXiv 2309.17453), and layers give it activations hundreds of times as
large as others' (massive activations: Sun et al., arXiv 2402.17762). Running text has none. What is
fitted on such text alone gives that token any size, and all that follows it in a context is lost.

Shapes: N windows, L tokens of one, B sequences of a batch, K layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dotexport.models.checkpoint import Checkpoint
from dotexport.models.loading import Loaded
from dotexport.models.text_windows import read_tokenizer
from dotexport.narrowing.streams import held_out_windows
from dotexport.storage.workspace import Workspace

CONTEXT = 16  # tokens of text in front of one that is looked at
MASSIVE = 16.0  # times the median length of the stream at these
LOOKED_AT = 512  # special tokens, the first; some tokenizers reserve hundreds
BATCH = 64
EVERY, TAIL = 4, 5  # one window in four has one, in its last fifth: what follows has lost its past
STEP = "sinks"  # its name in a workspace


def sinks(
    source: Checkpoint,
    windows_NL: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    workspace: Workspace | None = None,
) -> tuple[int, ...]:
    """Special tokens whose stream is massive behind some layer, though ordinary text precedes them.

    Args:
        windows_NL: ordinary text.
        workspace: keeps what was found.

    Raises:
        CheckpointError: no tokenizer, or weights that are not whole.
    """
    rows = source.config["vocab_size"]
    special = sorted(n for n in set(read_tokenizer(source.folder).all_special_ids) if n < rows)
    context_L = windows_NL[0, :CONTEXT]
    if not special or len(context_L) < CONTEXT:
        return ()
    workspace = workspace or Workspace()
    if kept := workspace.load(STEP):
        return tuple(kept[0]["tokens"])
    loaded = Loaded(source, dtype, device=device)
    found: list[int] = []
    for last_B in torch.tensor(special[:LOOKED_AT]).split(BATCH):
        tokens_BL = torch.cat([context_L.expand(len(last_B), -1), last_B[:, None]], dim=1)
        lengths_KBL = _lengths(loaded, tokens_BL)
        # The first token of any context is a sink by its place.
        ordinary_KB = lengths_KBL[:, :, 1:-1].median(dim=-1).values.clamp_min(1e-12)
        most_B = (lengths_KBL[:, :, -1] / ordinary_KB).amax(0)
        found += last_B[most_B >= MASSIVE].tolist()
    workspace.save(STEP, {"tokens": found})
    return tuple(found)


def sown(
    windows_NL: Tensor, found: Sequence[int], seed: int, *, held: Collection[int] | None = None
) -> Tensor:
    """The windows, one in EVERY with one of these tokens in the place of another: of those that are
    fitted on and of those that are held out the first, since either may be cut short.

    Args:
        held: which of them are held out; None: those that narrowing holds out.
    """
    if not found:
        return windows_NL
    sown_NL, random = windows_NL.clone(), np.random.default_rng(seed)
    count, length = windows_NL.shape
    held = held_out_windows(count) if held is None else held
    kinds = [sorted(set(range(count)).difference(held)), sorted(held)]
    for turn, window in enumerate(chain(*(kind[::EVERY] for kind in kinds))):
        place = random.integers(length - max(1, length // TAIL), length)
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
