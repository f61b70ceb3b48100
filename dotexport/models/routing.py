"""Which experts a token goes to, and how much each of them counts.

Shapes: T tokens, E experts, A experts that a token goes to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHARED = -1
"""In the place of an expert's number: the one that all tokens go to."""


@dataclass(frozen=True)
class Routing:
    """The experts of each token, (T, A), and their gates; and that of a shared one, (T, 1)."""

    experts_TA: Tensor
    gates_TA: Tensor
    shared_T1: Tensor | None = None

    @classmethod
    def of(cls, logits_TE: Tensor, per_token: int, *, normalised: bool) -> Routing:
        """The largest of a softmax over all experts.

        Args:
            normalised: whether gates of a token sum to 1.
        """
        gates_TA, experts_TA = logits_TE.float().softmax(-1).topk(per_token, -1)
        if normalised:
            gates_TA = gates_TA / gates_TA.sum(-1, keepdim=True)
        return cls(experts_TA, gates_TA)

    def sharing(self, weight_T1: Tensor | None) -> Routing:
        """With a shared expert that counts by the sigmoid of this; None: whole."""
        if weight_T1 is None:
            return replace(self, shared_T1=torch.ones_like(self.gates_TA[:, :1]))
        return replace(self, shared_T1=weight_T1.float().sigmoid())

    def to(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that go to this expert, and its gates there, (T, 1)."""
        if expert == SHARED:
            assert self.shared_T1 is not None
            return torch.arange(len(self.shared_T1), device=self.shared_T1.device), self.shared_T1
        tokens_T, place_T = torch.where(self.experts_TA == expert)
        return tokens_T, self.gates_TA[tokens_T, place_T, None]
