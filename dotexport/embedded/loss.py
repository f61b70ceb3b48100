"""The held-out loss of a model, per token and per character.

Shapes: B windows in a batch, L tokens in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

WINDOW = 512


@dataclass(frozen=True)
class HeldOutLoss:
    """Total surprise over the predicted tokens, and the characters that those tokens spell."""

    nats: float
    num_tokens: int
    num_characters: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.num_characters

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """All texts in one row, the separator before each."""
    assert tokenizer.bos_token_id is not None
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for row in rows for token in [tokenizer.bos_token_id, *row]]


def windows(stream: torch.Tensor) -> torch.Tensor:
    """Windows of L + 1 tokens, overlapping by one: all tokens but the first are targets."""
    return stream.unfold(0, WINDOW + 1, WINDOW)


@torch.no_grad()
def held_out_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    num_windows: int | None = None,
    batch: int = 8,
) -> HeldOutLoss:
    stream = torch.tensor(token_stream(tokenizer, texts), device=model.device)
    tokens_BL = windows(stream)[:num_windows]
    nats = 0.0
    for part_BL in torch.split(tokens_BL, batch):
        logits_BLV = model(input_ids=part_BL[:, :-1], use_cache=False).logits.float()
        targets_BL = part_BL[:, 1:]
        nats += cross_entropy(
            logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum"
        ).item()
    targets = tokens_BL[:, 1:].flatten().tolist()
    # The windows tile the text, so their targets decode to one unbroken piece of it.
    spelled = tokenizer.decode(
        targets, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return HeldOutLoss(nats, len(targets), len(spelled))
