"""Continuations that are judged: how many, how long, and of which artifacts."""

from __future__ import annotations

from dataclasses import dataclass

from dotexport.errors import UsageError
from dotexport.options import option


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What original and narrowed model are asked to go on with, greedily.

    Attributes:
        prompts: beginnings of the text, and as many questions where there is a chat template.
        tokens: of each continuation, at most.
    """

    prompts: int = option(
        16,
        help="Beginnings of the text that both models continue, and as many questions through the "
        "chat template, to see whether they still speak; 0: none.",
    )
    tokens: int = option(64, help="Tokens of a continuation.", flag="continuation")

    def __post_init__(self) -> None:
        if not 0 <= self.prompts <= 1024:
            raise UsageError(f"--prompts must be between 0 and 1024, not {self.prompts}")
        if not 8 <= self.tokens <= 4096:
            raise UsageError(f"--continuation must be between 8 and 4096, not {self.tokens}")
