"""What layers of some classes are given besides the stream: inputs of their own, which follow from
tokens, and keys and values that an earlier layer has made.

Shapes: N windows, B of them, L tokens per window, U tokens that occur, D hidden_size, P features of
an input, X = P x layers, H heads, F features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of layers for tokens that occur in a text: (norm(W_i e / sqrt(D)) + sqrt(P) t_i) /
    sqrt(2) of a token with the embedding e and the row t, for layer i.

    Attributes:
        occurring_U: the tokens, ascending.
        embedded_UD: what enters the stream of each.
        rows_UX: its row of the table for all layers, as stored.
        projection_XD: of all layers behind one another.
        norm: of P features.
    """

    occurring_U: Tensor
    embedded_UD: Tensor
    rows_UX: Tensor
    projection_XD: Tensor
    norm: nn.Module
    features: int

    def of(self, number: int, tokens_BL: Tensor) -> Tensor:
        """The input of layer `number`, (B, L, P)."""
        own = slice(number * self.features, (number + 1) * self.features)
        place_BL = torch.searchsorted(
            self.occurring_U, tokens_BL.to(self.occurring_U.device).contiguous()
        )
        embedded_BLD = self.embedded_UD[place_BL]
        width = embedded_BLD.shape[-1]
        seen_BLP = apply_linear(embedded_BLD, self.projection_XD[own]) * width**-0.5
        row_BLP = self.rows_UX[:, own][place_BL].float() * self.features**0.5
        input_BLP: Tensor = (self.norm(seen_BLP) + row_BLP) * 2.0**-0.5
        return input_BLP


@dataclass
class Beside:
    """What the layers of one model are given besides its stream, of the same windows.

    Attributes:
        tokens_NL: the windows.
        inputs: None where the class has none.
        keys: kind of layer -> keys and values (N, H, L, F) that later layers of that kind look at.
        made: those that a layer has made just now.
    """

    tokens_NL: Tensor
    inputs: LayerInputs | None = None
    keys: dict[str, KeysAndValues] = field(default_factory=dict)
    made: dict[str, KeysAndValues] = field(default_factory=dict)

    def input(self, number: int) -> Tensor:
        """Of layer `number`, (N, L, P)."""
        assert self.inputs is not None
        return self.inputs.of(number, self.tokens_NL)

    def keys_on(self, device: torch.device) -> dict[str, KeysAndValues]:
        """Those that a layer without any looks at."""
        return {kind: (k.to(device), v.to(device)) for kind, (k, v) in self.keys.items()}

    def of(self, rows: slice) -> Beside:
        """Of some of the windows."""
        keys = {kind: (k_NHLF[rows], v_NHLF[rows]) for kind, (k_NHLF, v_NHLF) in self.keys.items()}
        return Beside(self.tokens_NL[rows], self.inputs, keys)

    def passed(
        self, step: Through, stream_NLX: Tensor, rows: slice, device: torch.device
    ) -> Tensor:
        """Some windows of a stream behind the next sublayer, or layer, of its model."""
        some = self.of(rows)
        behind_BLX = step(stream_NLX[rows].to(device, non_blocking=True), some)
        for kind, made in some.made.items():
            if kind not in self.keys:
                count, place = len(self.tokens_NL), stream_NLX.device
                like = (torch.empty((count, *part.shape[1:]), device=place) for part in made)
                self.keys[kind] = (next(like), next(like))
            for all_NHLF, part_BHLF in zip(self.keys[kind], made, strict=True):
                all_NHLF[rows] = part_BHLF.to(all_NHLF.device)
        return behind_BLX


Through = Callable[[Tensor, Beside], Tensor]
"""A sublayer or more of a model: from a stream (B, L, X), and what lies beside it, to a stream."""
