"""The text that narrowing is fitted and judged on.

Shapes: N windows, L tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dotexport.narrowing.sinks import sown


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens, of one kind of text or of two.

    Attributes:
        windows_NL: the text that was asked for.
        other_NL: text of another kind, in windows as long; a share of either kind judges.
        sinks: special tokens that were sown in both (sinks.py).
    """

    windows_NL: Tensor
    other_NL: Tensor | None = None
    sinks: tuple[int, ...] = ()

    @property
    def kinds(self) -> tuple[Tensor, ...]:
        return (self.windows_NL,) if self.other_NL is None else (self.windows_NL, self.other_NL)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return int(self.windows_NL.shape[1])

    def __len__(self) -> int:
        """Windows of all kinds."""
        return sum(map(len, self.kinds))

    def of(self, kinds: Sequence[Tensor]) -> CalibrationText:
        """The same with these windows, as many kinds as before."""
        return replace(self, windows_NL=kinds[0], other_NL=kinds[1] if kinds[1:] else None)

    def last(self, length: int) -> CalibrationText:
        """Of each window the last `length` tokens, at most."""
        return self.of([kind_NL[:, -length:] for kind_NL in self.kinds])

    def sown(self, found: Sequence[int], seed: int) -> CalibrationText:
        """With these special tokens in one window of a few, of either kind."""
        turns = (0, len(self.windows_NL))
        kinds = [sown(k, found, seed, turn=t) for k, t in zip(self.kinds, turns, strict=False)]
        return replace(self.of(kinds), sinks=tuple(found))
