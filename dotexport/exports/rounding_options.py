"""What weights are rounded to integers for: what can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.models.text_options import MIXED, SOURCES, TextOptions
from dotexport.options import option

PANEL = "Rounding to integers"


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """A text, or none.

    Attributes:
        calib: as of `TextOptions.source`; None: every weight to its nearest level.
        samples: windows of it, at most.
        seqlen: tokens per window, or the model's context if that is shorter.
    """

    calib: str | None = option(
        None,
        help="Text that weights are rounded for, so that what they make of it changes least; "
        f"default: to the nearest level. {SOURCES} {MIXED}",
        panel=PANEL,
    )
    samples: int = option(
        64, help="Windows of that text, at most.", flag="calib_samples", panel=PANEL
    )
    seqlen: int = option(
        512,
        help="Tokens per window; the model's context if that is shorter.",
        flag="calib_seqlen",
        panel=PANEL,
    )

    def __post_init__(self) -> None:
        if self.calib is not None:
            self.text(self.seqlen)
        elif (self.samples, self.seqlen) != (64, 512):
            raise UsageError("--calib-samples and --calib-seqlen are of a text: give --calib too")

    def text(self, context: int) -> TextOptions:
        """Its windows for a model with this context."""
        assert self.calib is not None
        seqlen = min(self.seqlen, context)
        return TextOptions(source=self.calib, samples=self.samples, seqlen=seqlen)
